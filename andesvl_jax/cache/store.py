"""Kinds of storage of the keys or values of a KV cache, and what attention and writing need of them.

A store is a pytree of arrays [..., S, *] with the same axes in front of the slots, so that
`jax.tree.map` gathers, pads, slices and writes slots of every kind alike. The defaults serve plain
arrays; another kind is one class that registers `encode_like`, `dense`, `scores`, `mix` and
`kernel_arrays`.
B batch rows, T queries, S slots, N query heads, K kv heads, G = N / K, H head width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Store = Any  # a jax.Array [..., S, H] or a registered kind
KINDS = ("float", "int8")


def encode(kind: str, x: jax.Array) -> Store:
    """Keys or values [..., S, H] as a store of this kind.

    Raises:
      ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"the cache kind is {kind!r}, expected one of {', '.join(KINDS)}")
    return x if kind == "float" else Int8Rows.encode(x)


@functools.singledispatch
def encode_like(store: Store, x: jax.Array) -> Store:
    """Keys or values [..., S, H] in the kind and dtype of `store`."""
    return x.astype(store.dtype)


@functools.singledispatch
def dense(store: Store, dtype=None) -> jax.Array:
    """The array [..., S, H] that the store represents."""
    return store if dtype is None else store.astype(dtype)


@functools.singledispatch
def scores(store: Store, q: jax.Array) -> jax.Array:
    """Products of queries and keys, float32 [B, K, T, G, S]; this axis order needs no transpose.

    Args:
      store: [B, K, S, H].
      q: [B, T, K, G, H].
    """
    return jnp.einsum("btkgh,bksh->bktgs", q, store.astype(q.dtype), preferred_element_type=jnp.float32)


@functools.singledispatch
def mix(store: Store, weights: jax.Array, dtype) -> jax.Array:
    """Weighted sums of values, float32 [B, K, T, G, H].

    Args:
      store: [B, K, S, H].
      weights: float32 [B, K, T, G, S].
      dtype: in which the products are computed.
    """
    return jnp.einsum(
        "bktgs,bksh->bktgh",
        weights.astype(dtype),
        store.astype(dtype),
        preferred_element_type=jnp.float32,
    )


@functools.singledispatch
def kernel_arrays(store: Store) -> tuple[jax.Array, jax.Array | None]:
    """The numbers [..., S, H] and their scales [..., S], or None, for `kernels.cpu.few_queries`."""
    return store, None


@struct.dataclass
class Int8Rows:
    """Symmetric int8 with one scale per kv head and token.

    Attributes:
      codes: int8 [..., S, H].
      scales: float32 [..., S].
    """

    codes: jax.Array
    scales: jax.Array

    @classmethod
    def encode(cls, x: jax.Array) -> "Int8Rows":
        x = x.astype(jnp.float32)
        scales = jnp.max(jnp.abs(x), -1) / 127
        codes = jnp.round(x / jnp.where(scales > 0, scales, 1)[..., None]).astype(jnp.int8)
        return cls(codes, scales)


@encode_like.register(Int8Rows)
def _(store: Int8Rows, x):
    return Int8Rows.encode(x)


@dense.register(Int8Rows)
def _(store: Int8Rows, dtype=None):
    x = store.codes.astype(jnp.float32) * store.scales[..., None]
    return x if dtype is None else x.astype(dtype)


@scores.register(Int8Rows)
def _(store: Int8Rows, q):
    # codes are exact in any compute type
    return scores(store.codes, q) * store.scales[:, :, None, None]


@mix.register(Int8Rows)
def _(store: Int8Rows, weights, dtype):
    return mix(store.codes, weights * store.scales[:, :, None, None], dtype)


@kernel_arrays.register(Int8Rows)
def _(store: Int8Rows):
    return store.codes, store.scales
