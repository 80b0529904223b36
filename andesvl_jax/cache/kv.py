"""The KV cache as a value: what is kept, and for which position each slot stands.

L layers, B batch rows, K kv heads, C cache slots, H head width.
"""

import jax
import jax.numpy as jnp
from flax import struct

from andesvl_jax.config import TextConfig


@struct.dataclass
class Cache:
    """Attention masks come from `positions`, so slots may hold any tokens in any order, other ones in each head.

    keys, values: [L, B, K, C, H], keys already rotated; positions: int32 [L, B, K, C], -1 = empty;
    length: int32 [B], the position of each row's next token; cursor: int32 [], the next slot that is written.
    streamed: few queries read it through the compiled CPU kernel, which has no gradient: only the decoding loop sets it.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    length: jax.Array
    cursor: jax.Array
    streamed: bool = struct.field(pytree_node=False, default=False)

    @property
    def slots(self) -> int:
        return self.keys.shape[3]


def empty_cache(config: TextConfig, rows: int, slots: int, dtype) -> Cache:
    shape = (config.num_layers, rows, config.num_kv_heads, slots)
    zeros = jnp.zeros((*shape, config.head_dim), dtype)
    return Cache(
        zeros, jnp.zeros_like(zeros), jnp.full(shape, -1, jnp.int32), jnp.zeros(rows, jnp.int32), jnp.zeros((), jnp.int32)
    )


def reserve(cache: Cache, positions: jax.Array) -> Cache:
    """Marks the slots from `cursor` on as holding `positions` int32 [B, T] (-1: padding) in every layer and head.

    The caller sees to it that cursor + T <= C: XLA would clamp the write, not fail.
    """
    layers, rows, heads, _ = cache.positions.shape
    block = jnp.broadcast_to(positions[None, :, None], (layers, rows, heads, positions.shape[1]))
    return cache.replace(
        positions=jax.lax.dynamic_update_slice(cache.positions, block, (0, 0, 0, cache.cursor)),
        length=jnp.maximum(cache.length, positions.max(axis=1) + 1),
        cursor=cache.cursor + positions.shape[1],
    )


def grow(cache: Cache, slots: int) -> Cache:
    """The same cache with `slots` more empty slots behind it."""
    pad = lambda x, fill: jnp.pad(x, [(0, 0)] * 3 + [(0, slots)] + [(0, 0)] * (x.ndim - 4), constant_values=fill)  # noqa: E731
    return cache.replace(keys=pad(cache.keys, 0), values=pad(cache.values, 0), positions=pad(cache.positions, -1))


def cache_bytes(cache: Cache) -> int:
    """Allocated bytes: keys, values and the position index, padding slots included."""
    return sum(x.size * x.dtype.itemsize for x in (cache.keys, cache.values, cache.positions))
