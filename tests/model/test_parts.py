"""Attention over several parts equals attention over their concatenation; int8 parts equal their float values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import max_relative

from andesvl_jax.cache import store
from andesvl_jax.cache.kv import Cache
from andesvl_jax.kernels import cpu
from andesvl_jax.model import attention
from andesvl_jax.model.attention import Part, Place, attend, cache_part

TOLERANCE = 2e-6  # float32: sums in another order
B, T, H = 2, 11, 16
BACKENDS = {"einsum": ("einsum", 256), "chunked": ("chunked", 4)}


def random_part(rng, heads: int, slots: int, per_head: bool, masked: bool) -> Part:
    keys, values = (jnp.asarray(rng.normal(size=(B, heads, slots, H)), jnp.float32) for _ in range(2))
    positions = rng.integers(-1, 30, (B, heads, slots) if per_head else (B, slots)).astype(np.int32)
    mask = jnp.asarray(rng.random((B, T, slots)) < 0.7) if masked else None
    return Part(keys, values, Place(jnp.asarray(positions)), mask)


def concatenated(parts: list[Part], heads: int) -> Part:
    """One part with positions per head and a mask."""
    places = [p.place.positions for p in parts]
    places = [x if x.ndim == 3 else jnp.broadcast_to(x[:, None], (B, heads, x.shape[1])) for x in places]
    masks = [jnp.ones((B, T, p.keys.shape[2]), bool) if p.mask is None else p.mask for p in parts]
    keys, values = (jnp.concatenate([getattr(p, name) for p in parts], 2) for name in ("keys", "values"))
    return Part(keys, values, Place(jnp.concatenate(places, 2)), jnp.concatenate(masks, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(6, 3), (4, 4)])
@pytest.mark.parametrize("long", [False, True])
def test_parts_merged_equal_one_part(backend, heads, long, monkeypatch):
    """Random splits, an empty part, masks, grouped heads, a query that sees nothing; keys in blocks too."""
    if long:
        monkeypatch.setattr(attention, "MANY_KEYS", 10)
        monkeypatch.setattr(attention, "KEYS", 8)
    n, k = heads
    for seed, sizes in enumerate([(13, 21), (1, 0, 30), (0, 5, 9, 17)]):
        rng = np.random.default_rng(seed)
        parts = [random_part(rng, k, size, i % 2 == 0, (i + seed) % 2 == 0) for i, size in enumerate(sizes)]
        at = rng.integers(0, 30, (B, T)).astype(np.int32)
        at[0, 3] = -1  # sees nothing, like every padding query
        q, queries = (
            jnp.asarray(3 * rng.normal(size=(B, T, n, H)), jnp.float32),
            Place(jnp.asarray(at)),
        )
        expected = attend(q, [concatenated(parts, k)], queries, True, "einsum", 256)
        found = jax.jit(lambda q, parts: attend(q, parts, queries, True, *BACKENDS[backend]))(q, parts)
        there = np.ones((B, T, 1, 1), bool)
        if long:
            there[0, 3] = False  # a mean over padded blocks
        assert np.isfinite(found).all()
        assert max_relative(found * there, expected * there) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_int8_part_equals_its_float_values_and_nearly_the_original(backend):
    rng = np.random.default_rng(0)
    part, more = (random_part(rng, 2, size, True, False) for size in (40, 9))
    coded = part.replace(keys=store.encode("int8", part.keys), values=store.encode("int8", part.values))
    decoded = part.replace(keys=store.dense(coded.keys), values=store.dense(coded.values))
    q, queries = (
        jnp.asarray(rng.normal(size=(B, T, 4, H)), jnp.float32),
        Place(jnp.asarray(rng.integers(9, 30, (B, T)), jnp.int32)),
    )

    def run(part):
        return attend(q, [part, more], queries, True, *BACKENDS[backend])

    assert max_relative(run(coded), run(decoded)) <= TOLERANCE
    assert TOLERANCE < max_relative(run(coded), run(part)) <= 0.03


@pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")
@pytest.mark.parametrize("kind", store.KINDS)
def test_the_kernel_merges_the_cache_and_own_tokens_as_one_part(kind):
    rng, k = np.random.default_rng(0), 2
    cached, own = random_part(rng, k, 37, True, False), random_part(rng, k, T, False, True)
    at = np.arange(20, 20 + T, dtype=np.int32) - np.array([[0], [9]], np.int32)  # rows with lengths of their own
    own = own.replace(place=Place(jnp.asarray(at)), mask=own.mask | jnp.eye(T, dtype=bool), own=True)
    keys, values = (store.encode(kind, x) for x in (cached.keys, cached.values))
    cached = cached.replace(keys=store.dense(keys), values=store.dense(values))
    arrays = jax.tree.map(lambda x: x[None], (keys, values, cached.place.positions))
    cache = Cache(*arrays, jnp.zeros((1, B, k, 37), jnp.int8), jnp.full(B, 30), compiled=True)
    q = jnp.asarray(rng.normal(size=(B, T, 4, H)), jnp.float32)
    expected = attend(q, [concatenated([cached, own], k)], own.place, True, "einsum", 256)
    assert max_relative(attend(q, [cache_part(cache, 0), own], own.place, True, "auto", 256), expected) <= TOLERANCE
