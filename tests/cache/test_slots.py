"""The cache alone: tokens are written into any slots, kept, dropped and found again; its kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import max_relative

from andesvl_jax.cache import store
from andesvl_jax.cache.kv import (
    PICTURE,
    TEXT,
    Cache,
    KeyValues,
    RaggedCache,
    append,
    append_run,
    cache_bytes,
    cache_from,
    empty_cache,
    free,
    free_slots,
    grow,
    select,
    truncate,
)
from andesvl_jax.config import TextConfig
from andesvl_jax.kernels import cpu

L, B, K, H = 3, 2, 2, 4
CONFIG = TextConfig(num_layers=L, num_kv_heads=K, num_heads=K, head_dim=H)
WAYS = [
    (dtype, kind, compiled)
    for dtype, kind in (("float32", "float"), ("bfloat16", "float"), ("float32", "int8"))
    for compiled in (False, True)
    if not compiled or cpu.available()
]


def random_kv(seed: int, tokens: int, dtype="float32") -> KeyValues:
    keys, values = np.random.default_rng(seed).normal(size=(2, L, B, K, tokens, H))
    return KeyValues(jnp.asarray(keys, dtype), jnp.asarray(values, dtype))


def positions_of(start: int, tokens: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(start, start + tokens, dtype=jnp.int32), (B, tokens))


def contents(cache: Cache | RaggedCache) -> dict:
    """(layer, row, head, position) -> (modality, key, value) of every slot that holds a token."""
    found, layer = {}, 0
    for part in cache.parts if isinstance(cache, RaggedCache) else (cache,):
        keys, values = (np.asarray(store.dense(x), np.float32) for x in (part.keys, part.values))
        for (i, b, k, c), position in np.ndenumerate(np.asarray(part.positions)):
            if position >= 0:
                assert (layer + i, b, k, position) not in found, "a position occurs twice"
                entry = (
                    int(part.modality[i, b, k, c]),
                    keys[i, b, k, c].tolist(),
                    values[i, b, k, c].tolist(),
                )
                found[layer + i, b, k, int(position)] = entry
            else:
                assert part.modality[i, b, k, c] == -1
        layer += part.layers
    return found


@pytest.mark.parametrize(("dtype", "kind", "compiled"), WAYS)
def test_holes_are_reused_in_any_order_and_slots_outside_corrupt_nothing(dtype, kind, compiled):
    first, more, modality = (
        random_kv(0, 8, dtype),
        random_kv(1, 3, dtype),
        jnp.array([[PICTURE, TEXT, TEXT]] * B, jnp.int8),
    )
    cache = cache_from(first, positions_of(0, 8), jnp.zeros((B, 8), jnp.int8), kind)
    index = jnp.asarray(np.argsort(np.random.default_rng(2).random((B, K, 8)), -1), jnp.int32)
    index = jnp.where(index < 3, -1, index)  # three holes, elsewhere in every row and head
    holes = jax.jit(select)(cache, index).replace(compiled=compiled)
    appending = jax.jit(append)
    rest = jnp.broadcast_to(jnp.arange(3, 8), (B, K, 5))
    in_order = append(grow(select(cache, rest), 3), more, jnp.array([[5, 6, 7]] * B), positions_of(8, 3), modality)
    expected = contents(in_order)
    free_ones = free_slots(holes, 3)
    assert free_ones.shape == (L, B, K, 3) and free(holes).tolist() == [3, 3]
    for slots in (free_ones, free_ones[..., ::-1], free_ones[0]):
        filled = appending(holes, more, slots, positions_of(8, 3), modality)
        assert contents(filled) == expected and filled.length.tolist() == [11, 11] and free(filled).tolist() == [0, 0]
        assert {entry[0] for entry in contents(filled).values()} == {TEXT, PICTURE}
    assert (free_slots(filled, 2) == -1).all() and (free_slots(filled, 1) == -1).all()
    for outside in (-1, -9, 8, 2**30):
        kept = appending(holes, more, jnp.full((B, 3), outside), positions_of(8, 3), modality)
        assert contents(kept) == contents(holes) and kept.length.tolist() == holes.length.tolist()
    assert contents(appending(holes, more, free_ones, jnp.full((B, 3), -1), modality)) == contents(holes)  # padding


@pytest.mark.parametrize("kind", store.KINDS)
def test_append_run_equals_append_and_a_first_prefill(kind):
    kv, places, modality = (
        random_kv(0, 6),
        positions_of(0, 6).at[1, 4:].set(-1),
        jnp.full((B, 6), TEXT, jnp.int8),
    )
    first = cache_from(kv, places, modality, kind)
    assert first.length.tolist() == [6, 4]
    empty = empty_cache(CONFIG, B, 9, "float32", kind)
    by_slots = append(empty, kv, jnp.broadcast_to(jnp.arange(2, 8), (B, 6)), places, modality)
    by_run = append_run(empty, kv, jnp.int32(2), places, modality)
    assert contents(first) == contents(by_slots) == contents(by_run)
    assert by_slots.length.tolist() == by_run.length.tolist() == [6, 4]


def test_select_truncate_and_append_undo_each_other():
    cache = cache_from(random_kv(0, 7), positions_of(0, 7), jnp.full((B, 7), PICTURE, jnp.int8))
    longer = append(
        grow(cache, 4),
        random_kv(1, 4),
        jnp.array([[10, 8, 7, 9]] * B),
        positions_of(7, 4),
        jnp.zeros((B, 4), jnp.int8),
    )
    back = truncate(longer, jnp.array([7, 7]))
    assert contents(back) == contents(cache) and back.length.tolist() == [7, 7] and free(back).tolist() == [4, 4]
    uneven = truncate(longer, jnp.array([9, 3]))
    assert {k[3] for k in contents(uneven) if k[1] == 0} == set(range(9)) and uneven.length.tolist() == [9, 3]
    order = jnp.asarray(np.argsort(np.random.default_rng(0).random((L, B, K, 11)), -1), jnp.int32)
    shuffled = select(longer, order)
    assert contents(shuffled) == contents(longer)
    inverse = select(shuffled, jnp.argsort(order, -1))
    for found, expected in zip(jax.tree.leaves(inverse), jax.tree.leaves(longer), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_layers_may_keep_different_numbers_of_slots():
    cache = cache_from(random_kv(0, 6), positions_of(0, 6), jnp.zeros((B, 6), jnp.int8))
    index = tuple(jnp.broadcast_to(jnp.arange(n), (B, K, n)).at[..., 0].set(-1) for n in (2, 5, 3))
    ragged = select(cache, index)
    assert [part.slots for part in ragged.parts] == [2, 5, 3] and ragged.layers == L and ragged.slots == 5
    grown = grow(ragged, 1)
    assert cache_bytes(ragged) < cache_bytes(grown) < cache_bytes(cache) and free(grown).tolist() == [2, 2]
    slots = free_slots(grown, 2)
    filled = append(grown, random_kv(1, 2), slots, positions_of(6, 2), jnp.zeros((B, 2), jnp.int8))
    kept = {layer: sorted(key[3] for key in contents(filled) if key[:3] == (layer, 0, 0)) for layer in range(L)}
    assert kept == {0: [1, 6, 7], 1: [1, 2, 3, 4, 6, 7], 2: [1, 2, 6, 7]}
    assert contents(truncate(filled, jnp.array([6, 6]))) == contents(ragged)
    with pytest.raises(ValueError, match="slots for 2 layers, expected 3"):
        select(ragged, index[:2])


def test_int8_rounds_to_a_half_step_of_each_tokens_scale():
    x = jnp.asarray(
        np.random.default_rng(0).normal(size=(L, B, K, 9, H)) * 10.0 ** np.arange(-4, 5)[:, None],
        jnp.float32,
    )
    x = x.at[0, 0, 0, 0].set(0)
    rows = store.encode("int8", x)
    assert rows.codes.dtype == jnp.int8 and rows.scales.shape == x.shape[:-1]
    assert (jnp.abs(store.dense(rows) - x) <= 0.5001 * rows.scales[..., None]).all()
    np.testing.assert_array_equal(store.dense(rows)[0, 0, 0, 0], 0)
    assert max_relative(store.dense(rows), x) < 0.01
    with pytest.raises(ValueError, match="cache kind is 'int3', expected one of float, int8"):
        store.encode("int3", x)


def test_int8_takes_a_third_of_the_bytes():
    config = TextConfig(num_layers=L, num_kv_heads=K, num_heads=K, head_dim=128)
    plain, coded = (cache_bytes(empty_cache(config, B, 64, "float32", kind)) for kind in store.KINDS)
    assert coded < 0.27 * plain
