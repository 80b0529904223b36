"""What the decoder promises about a cache: it reads any slots, never writes, and a decoding loop writes without a copy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import max_relative, tiny_config, tiny_params

from andesvl_jax.cache.kv import (
    append,
    cache_bytes,
    cache_from,
    empty_cache,
    free_slots,
    grow,
    select,
    truncate,
)
from andesvl_jax.decoding.sampling import sampling_options
from andesvl_jax.decoding.state import SessionState, decode_until, make_room, prefill
from andesvl_jax.errors import UserError
from andesvl_jax.kernels import cpu
from andesvl_jax.model.andesvl import for_decoding, unstack_layers
from andesvl_jax.model.attention import Place, cache_part
from andesvl_jax.model.decoder import decode, decoder_layer, embed_tokens, text_rotation
from andesvl_jax.model.layers import rms_norm
from andesvl_jax.model.vision import encode, encoder_layer, patch_rotation

CONFIG = tiny_config(text={"head_dim": 16, "num_layers": 3})
LENGTHS = np.array([14, 9])
# loop over layers, kind of cache, compiled kernel
WAYS = [("scan", "float", False), ("unroll", "float", False), ("unroll", "int8", False)]
if cpu.available():
    WAYS += [("scan", "float", True), ("unroll", "float", True), ("unroll", "int8", True)]
TOLERANCE = 5e-6  # float32 sums in another order, through three layers


@functools.cache
def network(loop: str):
    params = tiny_params(CONFIG)
    return unstack_layers(params, CONFIG) if loop == "unroll" else (params, CONFIG)


@functools.partial(jax.jit, static_argnames=("config", "tap"))
def decoded(params, config, tokens, positions, cache, mask, tap):
    x = embed_tokens(params.decoder, config, tokens)
    return decode(params.decoder, config, x, Place(positions), cache, tap, mask)


def run(loop: str, tokens, positions, cache=None, mask=None, tap=None):
    return decoded(*network(loop), tokens, positions, cache, mask, tap)


def text(positions):
    return jnp.zeros_like(positions, jnp.int8)


@functools.cache
def prompt_cache(loop: str, kind: str, compiled: bool):
    """Two prompts of different length, and the cache behind them."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 14)), jnp.int32)
    positions = jnp.where(jnp.arange(14) < LENGTHS[:, None], jnp.arange(14), -1).astype(jnp.int32)
    new_kv = run(loop, tokens, positions).new_kv
    return cache_from(new_kv, positions, text(positions), kind).replace(compiled=compiled)


NEXT = jnp.array([[7, 8, 9], [17, 18, 19]], jnp.int32)


def next_positions(tokens: int) -> jax.Array:
    return jnp.asarray(LENGTHS[:, None] + np.arange(tokens), jnp.int32)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_any_slots_in_any_order_give_the_same_and_nothing_is_written(way):
    """Three tokens at once; each behind the other in order; and into holes of another order in each layer, row and head."""
    loop, kind, _ = way
    cache = grow(prompt_cache(*way), 3)
    before = jax.tree.map(np.array, cache)
    together = run(loop, NEXT, next_positions(3), cache)
    for found, expected in zip(jax.tree.leaves(cache), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(found, expected)
    order = np.argsort(np.random.default_rng(1).random(cache.positions.shape), -1).astype(np.int32)
    scattered = select(cache, jnp.asarray(order))
    for held in (cache, scattered):
        for t in range(3):
            at = next_positions(3)[:, t : t + 1]
            one = run(loop, NEXT[:, t : t + 1], at, held)
            held = append(held, one.new_kv, free_slots(held, 1), at, text(at))
            # an int8 cache holds earlier tokens rounded, a call of three sees them as they are
            assert max_relative(one.hidden[:, 0], together.hidden[:, t]) <= (TOLERANCE if kind == "float" else 0.03)


@pytest.mark.parametrize("way", [w for w in WAYS if w[0] == "unroll"], ids=str)
def test_layers_with_different_slots_equal_a_masked_big_cache(way):
    cache = grow(prompt_cache(*way), 4)
    kept = [np.sort(np.random.default_rng(i).permutation(14)[: 5 + 4 * i]) for i in range(3)]
    index = tuple(jnp.broadcast_to(jnp.asarray(slots, jnp.int32), (2, 2, len(slots))) for slots in kept)
    masked = cache.replace(
        positions=jnp.stack(
            [jnp.where(np.isin(np.arange(18), slots), x, -1) for slots, x in zip(kept, cache.positions, strict=True)]
        )
    )
    ragged = grow(select(cache, index), 2)
    for t in range(2):
        at = next_positions(3)[:, t : t + 1]
        expected, found = (run("unroll", NEXT[:, t : t + 1], at, held) for held in (masked, ragged))
        assert max_relative(found.hidden, expected.hidden) <= TOLERANCE
        masked = append(masked, expected.new_kv, jnp.full((2, 1), 14 + t), at, text(at))
        ragged = append(ragged, found.new_kv, free_slots(ragged, 1), at, text(at))
    with pytest.raises(ValueError, match="expected 'unroll' for layers with different numbers of slots"):
        run("scan", NEXT[:, :1], next_positions(1), ragged)


@pytest.mark.parametrize("way", [w for w in WAYS if w[1] == "float"], ids=str)
def test_a_tree_verified_at_once_equals_each_path_alone(way):
    """Nodes: 0 -> (1 -> (3, 4), 2 -> 5); the accepted path is appended, the rest dropped."""
    loop, cache = way[0], grow(prompt_cache(*way), 6)
    parents, tokens = (
        [-1, 0, 0, 1, 1, 2],
        jnp.array([[5, 6, 7, 8, 9, 10], [20, 21, 22, 23, 24, 25]], jnp.int32),
    )
    paths = []
    for node in range(6):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        paths.append(path)
    depth = np.array([len(path) - 1 for path in paths])
    mask = np.array([[other in path for other in range(6)] for path in paths])
    positions = jnp.asarray(LENGTHS[:, None] + depth, jnp.int32)
    verified = run(loop, tokens, positions, cache, jnp.broadcast_to(mask, (2, 6, 6)))
    for path in paths:
        alone = run(loop, tokens[:, path], next_positions(len(path)), cache)
        assert max_relative(verified.hidden[:, path[-1]], alone.hidden[:, -1]) <= TOLERANCE
    accepted = [paths[4], paths[5][:2]]  # of different length
    slots = np.full((2, 6), -1)
    for row, path in enumerate(accepted):
        slots[row, path] = 14 + np.arange(len(path))
    cache = append(cache, verified.new_kv, jnp.asarray(slots), positions, text(positions))
    assert cache.length.tolist() == [17, 11]
    after = run(loop, NEXT[:, :1], cache.length[:, None], cache)
    for row, path in enumerate(accepted):
        whole = jnp.concatenate([tokens[:, path], NEXT[:, :1]], 1)
        alone = run(loop, whole, next_positions(len(path) + 1), prompt_cache(*way))
        assert max_relative(after.hidden[row, 0], alone.hidden[row, -1]) <= TOLERANCE
    back = truncate(cache, jnp.asarray(LENGTHS))
    np.testing.assert_array_equal(
        run(loop, NEXT, next_positions(3), back).hidden,
        run(loop, NEXT, next_positions(3), grow(prompt_cache(*way), 6)).hidden,
    )


def queries_and_more(values):
    return values.queries, {
        "norm": jnp.linalg.norm(values.hidden, axis=-1),
        "input": values.attention_input[:, -1],
    }


def test_a_tap_sees_every_layer_alike_in_both_loops():
    queries, more = run("scan", NEXT, next_positions(3), tap=queries_and_more).taps
    assert queries.shape == (3, 2, 3, 4, 16) and more["norm"].shape == (3, 2, 3) and more["input"].shape == (3, 2, 24)
    unrolled = run("unroll", NEXT, next_positions(3), tap=queries_and_more).taps
    for found, expected in zip(jax.tree.leaves(unrolled), jax.tree.leaves((queries, more)), strict=True):
        assert max_relative(found, expected) <= TOLERANCE
    new_kv = run("scan", NEXT, next_positions(3)).new_kv
    assert new_kv.keys.shape == new_kv.values.shape == (3, 2, 2, 3, 16)


def test_layers_called_one_by_one_equal_the_decoder_and_the_encoder():
    params, config = network("unroll")
    cache, at = prompt_cache("unroll", "float", False), next_positions(3)
    x, rotary = embed_tokens(params.decoder, config, NEXT), text_rotation(config.text, at)
    for i, layer in enumerate(params.decoder.layers):
        values = decoder_layer(layer, config, x, Place(at), rotary, [cache_part(cache, i)])
        x = values.hidden
    found = rms_norm(x, params.decoder.norm, config.text.norm_eps)
    assert max_relative(found, run("unroll", NEXT, at, cache).hidden) <= TOLERANCE

    rng = np.random.default_rng(0)
    patches = jnp.asarray(rng.normal(size=(1, 8, 16)), jnp.float32)
    coordinates = jnp.asarray(np.indices((2, 4)).reshape(2, 8).T[None], jnp.int32)
    segments = jnp.zeros((1, 8), jnp.int32)
    y, place = patches, Place(segments, segments)
    for layer in params.vision.layers:
        y = encoder_layer(layer, config, y, place, patch_rotation(config.vision, coordinates))
    expected = encode(params.vision, config, patches, coordinates, segments)
    found = rms_norm(y, params.vision.norm, config.vision.norm_eps)
    assert max_relative(found, expected) <= TOLERANCE


def test_rows_of_a_decoding_loop_stand_at_their_own_counts_and_slots():
    """A row that is three tokens ahead, its slots in another order, ends with the tokens that it has alone."""
    params, config = network("scan")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 14)), jnp.int32)
    positions = jnp.where(jnp.arange(14) < LENGTHS[:, None], jnp.arange(14), -1).astype(jnp.int32)
    options, never = sampling_options(2), jnp.array([-1])
    prompt = prefill(params, config, tokens, positions, None, jnp.full_like(tokens, -1))

    def start():
        return make_room(prompt, 16, 16)

    whole = np.asarray(decode_until(params, config, start(), options, never, 8).tokens)
    ahead = decode_until(params, config, start(), options, never, 3)
    behind = start()
    rows = jnp.array([True, False])

    def mixed(ahead, behind):
        return jnp.where(rows.reshape(-1, *[1] * (ahead.ndim - 1)), ahead, behind)

    state = jax.tree.map(mixed, ahead.replace(cache=None), behind.replace(cache=None))
    index = jnp.where(rows[:, None], jnp.arange(29, -1, -1), jnp.arange(30))[:, None].repeat(2, 1)
    both = truncate(ahead.cache, jnp.array([17, LENGTHS[1]]))  # the second row has nothing new
    next_slot = jnp.where(rows, 0, state.next_slot)  # the first row is reversed: its empty slots come first
    state = state.replace(cache=select(both, index), next_slot=next_slot)
    assert state.counts.tolist() == [3, 0]
    state = decode_until(params, config, state, options, never, 8)
    np.testing.assert_array_equal(state.tokens, whole)
    assert state.counts.tolist() == [8, 8] and state.next_slot.tolist() == [5, 14 + 8]


def test_the_form_of_the_layers_must_be_the_configs():
    params, _ = network("unroll")
    x = jnp.zeros((1, 2, 24))
    with pytest.raises(UserError, match="layer_loop is 'scan', which takes stacked layers; found a tuple of layers"):
        decode(params.decoder, CONFIG, x, Place(jnp.arange(2)[None]))
    with pytest.raises(
        UserError,
        match="layer_loop is 'unroll', which takes a tuple of layers; found stacked layers",
    ):
        decode(
            tiny_params(CONFIG).decoder,
            CONFIG.replace(layer_loop="unroll"),
            x,
            Place(jnp.arange(2)[None]),
        )


LOOPS = [("float32", "float"), ("bfloat16", "float"), ("float32", "int8")]


@pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")
@pytest.mark.parametrize(("dtype", "kind"), LOOPS)
@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_the_decoding_loop_does_not_copy_the_cache(loop, dtype, kind):
    config = CONFIG.replace(dtype=dtype)
    params = tiny_params(config)
    if loop == "unroll":
        params, config = for_decoding(params, config)
    cache = empty_cache(config.text, 2, 4096, dtype, kind)
    seen, count = jnp.zeros((2, 64), bool), jnp.zeros(2, jnp.int32)
    cache = grow(cache, 16).replace(compiled=True)
    state = SessionState(cache, count, jnp.zeros((2, 64)), seen, seen, jnp.zeros((2, 16), jnp.int32), count, count > 0, None)
    state = jax.eval_shape(lambda: state)
    arguments = (params, config, state, sampling_options(2), jnp.array([-1]), jnp.int32(5))
    memory = decode_until.lower(*arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes(state.cache)
    assert memory.temp_size_in_bytes <= 0.02 * cache_bytes(state.cache)
