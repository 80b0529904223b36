"""The KV cache: stores with the position and the modality of every slot, and functions on them.

Attention masks come from `positions`, so slots may hold any tokens in any order, other ones in each
layer, row and head. Every function returns a new cache; nothing else writes one.
L layers, B batch rows, K kv heads, C cache slots, T tokens, H head width.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from andesvl_jax.cache.store import Store, encode, encode_like
from andesvl_jax.config import TextConfig
from andesvl_jax.kernels import cpu

TEXT, PICTURE, PADDING = 0, 1, -1  # modalities


@struct.dataclass
class KeyValues:
    """Keys (after RoPE) and values of some tokens.

    Attributes:
      keys, values: [L, B, K, T, H].
      after_reads: int32 [B], zeros that depend on every read of the cache, or None. `append` adds
        them to the slots, so that XLA orders the write behind the reads and copies no cache.
    """

    keys: jax.Array
    values: jax.Array
    after_reads: jax.Array | None = None


@struct.dataclass
class Cache:
    """All layers with the same number of slots.

    Attributes:
      keys, values: stores [L, B, K, C, H], keys after RoPE.
      positions: int32 [L, B, K, C], -1 = empty.
      modality: int8 [L, B, K, C], TEXT, PICTURE or PADDING (empty).
      length: int32 [B], position of the next token of each row.
      compiled: reads of a few queries and writes go through the C++ kernels, which have no gradient
        and serve one CPU device.
    """

    keys: Store
    values: Store
    positions: jax.Array
    modality: jax.Array
    length: jax.Array
    compiled: bool = struct.field(pytree_node=False, default=False)

    @property
    def slots(self) -> int:
        return self.positions.shape[-1]

    @property
    def layers(self) -> int:
        return len(self.positions)


@struct.dataclass
class RaggedCache:
    """Layers with different numbers of slots, each a `Cache` with L = 1, for an unrolled decoder."""

    parts: tuple[Cache, ...]

    @property
    def length(self) -> jax.Array:
        return self.parts[0].length

    @property
    def slots(self) -> int:
        """Slots of the largest layer."""
        return max(part.slots for part in self.parts)

    @property
    def layers(self) -> int:
        return len(self.parts)


def empty_cache(config: TextConfig, rows: int, slots: int, dtype, kind: str = "float") -> Cache:
    """A cache that holds nothing. kind: as `encode` takes."""
    shape = (config.num_layers, rows, config.num_kv_heads, slots)
    zeros = encode(kind, jnp.zeros((*shape, config.head_dim), dtype))
    nothing = jnp.full(shape, -1, jnp.int32)
    return Cache(
        zeros,
        jax.tree.map(jnp.zeros_like, zeros),  # arrays of its own, so that both can be donated
        nothing,
        nothing.astype(jnp.int8),
        jnp.zeros(rows, jnp.int32),
    )


def cache_from(new_kv: KeyValues, positions: jax.Array, modality: jax.Array, kind: str = "float") -> Cache:
    """The cache that holds these tokens alone, token t in slot t: a first prefill.

    Args:
      positions: int32 [B, T], -1 = padding, which leaves its slot empty.
      modality: int8 [B, T].
    """
    places = _of_slots(new_kv, positions, modality)
    length = positions.max(axis=1) + 1
    return Cache(encode(kind, new_kv.keys), encode(kind, new_kv.values), *places, length)


def append(
    cache: Cache | RaggedCache,
    new_kv: KeyValues,
    slots: Any,
    positions: jax.Array,
    modality: jax.Array,
) -> Any:
    """The cache with the tokens of `new_kv` written into `slots`; what these slots held is gone.

    Args:
      slots: int32 [B, T], [B, K, T] or [L, B, K, T], for a `RaggedCache` also a tuple of [B, K, T].
        -1, like any slot that the cache lacks, skips the token there. No slot may occur twice in a
        row and head.
      positions: int32 [B, T], -1 = padding, which leaves its slot empty.
      modality: int8 [B, T].
    """
    if isinstance(cache, RaggedCache):
        return _by_layer(
            lambda part, kv, at: append(part, kv, at, positions, modality),
            cache,
            new_kv,
            _layers_of(slots, cache),
        )
    rows, heads, tokens = new_kv.keys.shape[1:4]
    if slots.ndim == 2:
        slots = slots[:, None]
    slots = jnp.broadcast_to(slots, (*slots.shape[:-3], rows, heads, tokens))
    if new_kv.after_reads is not None:
        slots = slots + new_kv.after_reads[:, None, None]
    if cache.compiled:
        slots = jnp.broadcast_to(slots, new_kv.keys.shape[:-1])
        changed = _written(cache, new_kv, positions, modality, lambda x, rows: cpu.write_slots(x, rows, slots))
    else:
        changed = _written(cache, new_kv, positions, modality, functools.partial(_write_all, slots=slots))
    written = (slots >= 0) & (slots < cache.slots)
    stored = jnp.where(written.reshape(-1, rows, heads, tokens).any((0, 2)), positions, -1)
    length = jnp.maximum(cache.length, stored.max(axis=1, initial=-1) + 1)
    return changed.replace(length=length)


def append_run(cache: Cache, new_kv: KeyValues, start: jax.Array, positions: jax.Array, modality: jax.Array) -> Cache:
    """`append` into T slots in a row: one dynamic slice for all rows, which exported programs need.

    Args:
      start: int32 [], the first slot. The caller keeps start + T <= C: XLA moves a slice that does
        not fit.
    """
    if new_kv.after_reads is not None:
        start = start + new_kv.after_reads.sum()

    def write(arrays, rows):
        return [jax.lax.dynamic_update_slice_in_dim(x, new, start, 3) for x, new in zip(arrays, rows, strict=True)]

    changed = _written(cache, new_kv, positions, modality, write)
    return changed.replace(length=jnp.maximum(cache.length, positions.max(axis=1) + 1))


def free_slots(cache: Cache | RaggedCache, tokens: int) -> Any:
    """The first empty slots, int32 [L, B, K, T] (`RaggedCache`: a tuple of [B, K, T]); -1: too few."""
    if isinstance(cache, RaggedCache):
        return tuple(free_slots(part, tokens)[0] for part in cache.parts)
    empty = cache.positions < 0
    if tokens == 1:
        return jnp.where(empty.any(-1), jnp.argmax(empty, -1), -1)[..., None].astype(jnp.int32)
    rank, index = jax.lax.top_k(jnp.where(empty, cache.slots - jnp.arange(cache.slots), 0), min(tokens, cache.slots))
    index = jnp.where(rank > 0, index, -1)
    pad = [(0, 0)] * 3 + [(0, tokens - index.shape[-1])]
    return jnp.pad(index, pad, constant_values=-1)


def free(cache: Cache | RaggedCache) -> jax.Array:
    """int32 [B]: tokens that still fit into every layer and head of a row."""
    parts = cache.parts if isinstance(cache, RaggedCache) else (cache,)
    return jnp.stack([(part.positions < 0).sum(-1).min((0, 2)) for part in parts]).min(0)


def select(cache: Cache | RaggedCache, index: Any) -> Cache | RaggedCache:
    """The cache with the slots `index` alone, in that order.

    Args:
      index: int32 [B, K, C'] or [L, B, K, C'], -1 = an empty slot; or a tuple of [B, K, C'_l], one
        per layer, which makes a `RaggedCache`.
    """
    if isinstance(cache, RaggedCache) or isinstance(index, tuple):
        parts = _parts_of(cache)
        chosen = zip(parts, _layers_of(index, cache), strict=True)
        return RaggedCache(tuple(select(part, jnp.asarray(at)[None]) for part, at in chosen))
    index = jnp.broadcast_to(index, (*cache.positions.shape[:3], index.shape[-1]))
    kept = jnp.maximum(index, 0)

    def gather(x):
        words = _words(x)
        taken = jnp.take_along_axis(words, kept.reshape(*kept.shape, *[1] * (x.ndim - 4)), 3)
        return taken if words is x else jax.lax.bitcast_convert_type(taken, x.dtype)

    def marks(x):
        return jnp.where(index >= 0, gather(x), -1).astype(x.dtype)

    return cache.replace(
        keys=jax.tree.map(gather, cache.keys),
        values=jax.tree.map(gather, cache.values),
        positions=marks(cache.positions),
        modality=marks(cache.modality),
    )


def truncate(cache: Cache | RaggedCache, length: jax.Array) -> Cache | RaggedCache:
    """The cache without the tokens at positions >= length, int32 [B]; their slots are empty."""
    if isinstance(cache, RaggedCache):
        return RaggedCache(tuple(truncate(part, length) for part in cache.parts))
    positions = jnp.where(cache.positions < length[:, None, None], cache.positions, -1)
    modality = jnp.where(positions >= 0, cache.modality, PADDING).astype(cache.modality.dtype)
    return cache.replace(positions=positions, modality=modality, length=jnp.minimum(cache.length, length))


def grow(cache: Cache | RaggedCache, slots: int) -> Cache | RaggedCache:
    """The same cache with `slots` more empty slots behind it."""
    if isinstance(cache, RaggedCache):
        return RaggedCache(tuple(grow(part, slots) for part in cache.parts))

    def pad(x, fill=0):
        widths = [(0, slots if axis == 3 else 0) for axis in range(x.ndim)]
        return jnp.pad(x, widths, constant_values=fill)

    return cache.replace(
        keys=jax.tree.map(pad, cache.keys),
        values=jax.tree.map(pad, cache.values),
        positions=pad(cache.positions, -1),
        modality=pad(cache.modality, PADDING),
    )


def cache_bytes(cache: Cache | RaggedCache) -> int:
    """Allocated bytes: keys, values, positions and modality, empty slots included."""
    parts = _parts_of(cache) if isinstance(cache, RaggedCache) else (cache,)
    arrays = jax.tree.leaves([(part.keys, part.values, part.positions, part.modality) for part in parts])
    return sum(x.size * x.dtype.itemsize for x in arrays)


def _of_slots(new_kv: KeyValues, positions, modality) -> tuple[jax.Array, jax.Array]:
    """positions int32 and modality int8 [B, T] of tokens as [L, B, K, T]."""
    modality = jnp.where(positions >= 0, modality, PADDING).astype(jnp.int8)
    shape = new_kv.keys.shape[:-1]
    return tuple(jnp.broadcast_to(x[None, :, None], shape) for x in (positions, modality))


def _written(cache: Cache, new_kv: KeyValues, positions, modality, write: Callable) -> Cache:
    """The cache with write(arrays, rows) for its arrays, its length as it was."""
    old, tree = jax.tree.flatten((cache.keys, cache.values, cache.positions, cache.modality))
    rows = encode_like(cache.keys, new_kv.keys), encode_like(cache.values, new_kv.values)
    new = jax.tree.leaves((*rows, *_of_slots(new_kv, positions, modality)))
    keys, values, places, kinds = tree.unflatten(write(old, new))
    return cache.replace(keys=keys, values=values, positions=places, modality=kinds)


def _write(x: jax.Array, rows: jax.Array, slots: jax.Array) -> jax.Array:
    """x [L, B, K, C, ...] with rows [L, B, K, T, ...] at slots [B, K, T] or [L, B, K, T]."""
    slots = jnp.where(slots < 0, x.shape[3], slots)  # out of range: dropped; -1 would be the last
    batch = tuple(range(4 - slots.ndim, 3))  # axes that slots and x share
    window = (*range(batch[0]), *range(4, x.ndim))
    axes = jax.lax.ScatterDimensionNumbers(
        update_window_dims=window,
        inserted_window_dims=(3,),
        scatter_dims_to_operand_dims=(3,),
        operand_batching_dims=batch,
        scatter_indices_batching_dims=tuple(range(len(batch))),
    )
    words = _words(x)
    mode = jax.lax.GatherScatterMode.FILL_OR_DROP
    out = jax.lax.scatter(words, slots[..., None], _words(rows), axes, mode=mode)
    return out if words is x else jax.lax.bitcast_convert_type(out, x.dtype)


def _write_all(arrays: list[jax.Array], rows: list[jax.Array], slots: jax.Array) -> list[jax.Array]:
    return [_write(x, new, slots) for x, new in zip(arrays, rows, strict=True)]


def _words(x: jax.Array) -> jax.Array:
    """16-bit floats as integers: XLA's CPU backend gathers and scatters them by way of float32."""
    half = x.dtype.itemsize == 2 and jnp.issubdtype(x.dtype, jnp.floating)
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if half else x


def _parts_of(cache: Cache | RaggedCache) -> Sequence[Cache]:
    """A `Cache` with L = 1 for each layer."""
    if isinstance(cache, RaggedCache):
        return cache.parts
    arrays = cache.keys, cache.values, cache.positions, cache.modality
    layers = [jax.tree.map(lambda x, i=i: x[i : i + 1], arrays) for i in range(cache.layers)]
    return [Cache(*layer, cache.length, cache.compiled) for layer in layers]


def _layers_of(slots: Any, cache: Cache | RaggedCache) -> Sequence[jax.Array]:
    """What `append` or `select` takes for all layers -> one [B, K, T] (or [B, T]) for each.

    Raises:
      ValueError: not as many as the cache has layers.
    """
    each = slots if isinstance(slots, tuple) else list(slots) if slots.ndim == 4 else [slots] * cache.layers
    if len(each) != cache.layers:
        raise ValueError(f"slots for {len(each)} layers, expected {cache.layers}, as the cache has")
    return each


def _by_layer(fn, cache: RaggedCache, new_kv: KeyValues, slots: Sequence[jax.Array]) -> RaggedCache:
    keys, values = new_kv.keys, new_kv.values
    tokens = [new_kv.replace(keys=keys[i : i + 1], values=values[i : i + 1]) for i in range(cache.layers)]
    return RaggedCache(tuple(fn(*args) for args in zip(cache.parts, tokens, slots, strict=True)))
