"""Attention by blocks and by the compiled kernel: equal to the plain one, and small in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import max_relative, tiny_config, tiny_params

from andesvl_jax.cache.kv import Cache
from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.decoding.sampling import sampling_options
from andesvl_jax.decoding.session import Session
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.packing import ImageRow, make_sample
from andesvl_jax.kernels import cpu
from andesvl_jax.model import attention, packed
from andesvl_jax.model.andesvl import encode_images, for_decoding
from andesvl_jax.model.attention import Part, Place, attend, cache_part

TOLERANCE = 2e-6  # float32: sums in another order
needs_kernel = pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")


@pytest.fixture(params=[False, True])
def long(request, monkeypatch):
    """The short rows of a test as they are, and as if they were long: keys in blocks too."""
    if request.param:
        monkeypatch.setattr(attention, "MANY_KEYS", 20)
        monkeypatch.setattr(attention, "KEYS", 16)


@pytest.mark.parametrize("heads", [(6, 3), (4, 4)])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.usefixtures("long")
def test_blocks_equal_the_whole(heads, per_head):
    """Segments, padding, positions that differ between kv heads, and lengths that blocks do not divide."""
    n, k = heads
    b, t, s, h = 2, 29, 37, 8
    rng = np.random.default_rng(0)
    q, keys, values = (jnp.asarray(rng.normal(size=x), jnp.float32) for x in ((b, t, n, h), (b, k, s, h), (b, k, s, h)))
    positions = rng.integers(-1, s, (b, k, s) if per_head else (b, s)).astype(np.int32)
    positions[..., 0] = 0  # every query sees something
    segments = None if per_head else np.sort(rng.integers(0, 3, (b, s))).astype(np.int32)
    here = Place(rng.integers(0, s, (b, t)).astype(np.int32), None if per_head else segments[:, :t])
    run = lambda backend: attend(q, [Part(keys, values, Place(positions, segments))], here, per_head, backend, 8)  # noqa: E731
    assert max_relative(run("chunked"), run("einsum")) <= TOLERANCE


def packed_place(rng, rows: int, t: int) -> Place:
    """Segments of random lengths one behind the other, positions from 0 in each, the last few slots empty."""
    segments, positions = np.full((rows, t), -1, np.int32), np.full((rows, t), -1, np.int32)
    for row in range(rows):
        edges = [0, *np.sort(rng.choice(np.arange(1, t - 9), 4, replace=False)), t - 5 * row]
        for number, (first, last) in enumerate(zip(edges, edges[1:])):
            segments[row, first:last], positions[row, first:last] = number, np.arange(last - first)
    return Place(jnp.asarray(positions), jnp.asarray(segments))


@pytest.mark.parametrize("chunk", [16, 256])
@pytest.mark.usefixtures("long")
def test_a_causal_row_in_pieces_equals_the_whole_and_leaves_the_later_pieces_out(chunk):
    t, rng = 203, np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=x), jnp.float32) for x in ((2, t, 4, 8), (2, 2, t, 8), (2, 2, t, 8)))
    place = packed_place(rng, 2, t)
    there = (np.asarray(place.positions) >= 0)[..., None, None]

    def run(backend):
        def loss(q, k, v):
            return (jnp.where(there, attend(q, [Part(k, v, place, own=True)], place, True, backend, chunk), 0) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))

    for found, expected in zip(jax.tree.leaves(run("chunked")(q, k, v)), jax.tree.leaves(run("einsum")(q, k, v)), strict=True):
        assert max_relative(found, expected) <= TOLERANCE
    if chunk > t:  # XLA counts a loop once
        work = lambda backend: run(backend).lower(q, k, v).compile().cost_analysis()["flops"]  # noqa: E731
        assert work("chunked") <= 0.7 * work("einsum")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_long_packed_rows_equal_the_whole_in_both_passes(dtype, shuffled, monkeypatch):
    """Also of segments in any order, and lengths that blocks do not divide."""
    met = []
    monkeypatch.setattr(attention, "LONG_ROW", 0)
    monkeypatch.setattr(attention, "packed", lambda *args: met.append(args) or packed.packed(*args))
    t, rng = 333, np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=x), dtype) for x in ((2, t, 6, 8), (2, 3, t, 8), (2, 3, t, 8)))
    place = packed_place(rng, 2, t)
    if shuffled:
        place = place.replace(segments=jnp.where(place.segments < 0, -1, jnp.array([3, 0, 4, 1, 2])[place.segments]))
    there = (np.asarray(place.positions) >= 0)[..., None, None]

    def run(backend, dtype):
        def loss(q, k, v):
            y = attend(q, [Part(k, v, place, own=True)], place, True, backend, 48)
            return (jnp.where(there, y, 0).astype(jnp.float32) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*(x.astype(dtype) for x in (q, k, v)))

    tolerance = 5e-6 if dtype == "float32" else 2e-2  # weights made from sums; 8 bits of a bfloat16
    for found, expected in zip(jax.tree.leaves(run("chunked", dtype)), jax.tree.leaves(run("einsum", "float32")), strict=True):
        assert max_relative(found.astype(jnp.float32), expected) <= tolerance
    assert len(met) == 1  # by the chunked backend only


def test_a_block_of_a_packed_row_meets_only_the_blocks_that_its_segments_touch():
    segments = jnp.repeat(jnp.arange(20), 100).at[1900:].set(-1)  # conversations of 100 tokens, the last one padding
    *_, first, count = packed._parts(jnp.zeros((20, 1, 100, 1, 1)), segments, segments)
    np.testing.assert_array_equal((first, count), (np.arange(20), np.ones(20)))
    *_, first, count = packed._parts(jnp.zeros((16, 1, 125, 1, 1)), segments, segments)
    assert count.max() == 2 and first[-1] == 15 - (count[-1] - 1)


def test_memory_of_the_encoder_grows_with_the_patches_not_with_their_square():
    config = tiny_config(vision={"num_heads": 4}, attention_chunk=64)
    params = tiny_params(config)

    def temporary(side: int) -> int:
        p = side * side
        raster = np.indices((side, side), dtype=np.int32).reshape(2, p).T[None]
        row = ImageRow(np.zeros((1, p, 12), np.float32), raster, np.full_like(raster, side), np.zeros((1, p), np.int32))
        compiled = jax.jit(encode_images, static_argnums=1).lower(params, config, row).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(32), temporary(64)
    assert large <= 5 * small
    assert large < 4096 * 4096 * 4  # less than the scores of one head


@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # one kv head after the other, all together
@pytest.mark.parametrize("causal", [True, False])
def test_neither_pass_of_blocks_holds_the_square(causal, platform, monkeypatch):
    monkeypatch.setattr(attention, "target_platform", lambda: platform)

    def temporary(t: int) -> int:
        q, kv, slots = (
            jax.ShapeDtypeStruct(s, d) for s, d in (((1, t, 4, 8), "float32"), ((1, 2, t, 8), "float32"), ((1, t), "int32"))
        )

        def loss(q, k, v, positions, segments):
            place = Place(positions, segments)
            return attend(q, [Part(k, v, place, own=True)], place, causal, "chunked", 32).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, kv, kv, slots, slots).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(1024), temporary(4096)
    assert large <= 4.5 * small  # as the tokens
    assert large < 4096 * 4096 * 4 / 2  # half the scores of one of four heads


def random_cache(rng, layers, b, k, c, h, dtype="float32") -> Cache:
    """Slots in any order, other ones in each head, a third of them empty."""
    keys, values = (jnp.asarray(rng.normal(size=(layers, b, k, c, h)), dtype) for _ in range(2))
    slots = np.argsort(rng.random((layers, b, k, c)), -1).astype(np.int32)
    slots = jnp.asarray(np.where(rng.random(slots.shape) < 0.3, -1, slots))
    return Cache(keys, values, slots, jnp.zeros_like(slots, jnp.int8), jnp.full(b, c, jnp.int32))


@needs_kernel
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 4, 2, 13, 16), (3, 2, 5, 8, 2, 40, 128), (2, 2, 1, 4, 4, 700, 80)], ids=str)
def test_few_queries_by_the_kernel_equal_plain_attention(shape, dtype, masked):
    """Queries that see only some slots and some of their own tokens, rows with other lengths, padding among the tokens."""
    layers, b, t, n, k, c, h = shape
    rng = np.random.default_rng(0)
    cache = random_cache(rng, layers, b, k, c, h, dtype)
    q = jnp.asarray(3 * rng.normal(size=(b, t, n, h)), jnp.float32)
    own_keys, own_values = (jnp.asarray(rng.normal(size=(b, k, t, h)), jnp.float32) for _ in range(2))
    at = np.sort(rng.integers(c // 2, c, (b, t)), -1).astype(np.int32)
    at[:, t - t // 3 :] = -1  # padding
    mask = jnp.asarray(np.tril(rng.random((b, t, t)) < 0.6) | np.eye(t, dtype=bool)) if masked else None
    place = Place(jnp.asarray(at))
    own = Part(own_keys, own_values, place, mask, own=True)
    attending = jax.jit(lambda cache, layer: attend(q, [cache_part(cache, layer), own], place, True, "einsum", 256))
    for layer in range(layers):
        expected = attending(cache, jnp.int32(layer)) * (at >= 0)[..., None, None]  # the kernel gives padding zeros
        found = attending(cache.replace(compiled=True), jnp.int32(layer))
        assert max_relative(found, expected) <= TOLERANCE


@needs_kernel
def test_a_query_that_sees_nothing_gets_zeros_from_the_kernel():
    slots = jnp.array([[[[-1, 3, 4, -1, -1]]]], jnp.int32)
    cache = Cache(*(jnp.ones((1, 1, 1, 5, 16)),) * 2, slots, slots.astype(jnp.int8), None, compiled=True)
    place, kv = Place(jnp.array([[2, 3]], jnp.int32)), jnp.full((1, 1, 2, 16), 7.0)
    own = Part(kv, kv, place, jnp.zeros((1, 2, 2), bool), own=True)
    found = attend(jnp.ones((1, 2, 1, 16)), [cache_part(cache, 0), own], place, True, "einsum", 256)
    np.testing.assert_array_equal(found[0, :, 0, 0], [0, 1])


@needs_kernel
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_decoding_by_the_kernel_equals_decoding_without_it(weights, monkeypatch):
    config = tiny_config(text={"head_dim": 16})
    rng = np.random.default_rng(0)
    samples = [make_sample(rng.integers(0, 60, n), np.zeros(n, bool), (), -1) for n in (9, 21)]

    def answer():
        params, unrolled = for_decoding(tiny_params(config), config, weights)
        session = Session(Bundle(unrolled, params, None, ImageProcessor(patch_size=config.vision.patch_size)))
        session.extend(samples)
        list(session.generate(sampling_options(2), 12))
        return session.state

    compiled = answer()
    monkeypatch.setattr(cpu, "available", lambda: False)
    plain = answer()
    assert compiled.cache.compiled and not plain.cache.compiled
    np.testing.assert_array_equal(compiled.tokens, plain.tokens)
    assert max_relative(compiled.last, plain.last) <= 1e-5  # twelve steps of two layers, each rounding differently
