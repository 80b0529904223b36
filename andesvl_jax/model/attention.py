"""Attention over tokens that know where they stand. Masks come from positions and segments, never from slot order.

B batch rows, T queries, S keys, N query heads, K kv heads, G = N / K, H head width.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

MASKED = -1e30  # finite, so that a padding query (nothing visible) yields a mean of values, not NaN


@struct.dataclass
class Place:
    """Where tokens stand: positions int32 [B, S] or per kv head [B, K, S], -1 = empty; segments int32 [B, S] or None."""

    positions: jax.Array
    segments: jax.Array | None = None


def visible(queries: Place, keys: Place, causal: bool) -> jax.Array:
    """bool [B, 1 or K, T, S]: key present, in the query's segment, and (causal) not after the query."""
    key = keys.positions if keys.positions.ndim == 3 else keys.positions[:, None]
    key = key[:, :, None]
    mask = key >= 0
    if causal:
        mask = mask & (key <= queries.positions[:, None, :, None])
    if queries.segments is not None:
        mask = mask & (queries.segments[:, :, None] == keys.segments[:, None, :])[:, None]
    return mask


def attend(q, k, v, queries: Place, keys: Place, causal: bool, backend: str, chunk: int) -> jax.Array:
    """Softmax attention with scale H^-0.5.

    Args:
      q: [B, T, N, H]; k, v: [B, K, S, H]; queries, keys: where each stands.
      backend: "einsum" holds all T x S scores; "chunked" holds `chunk` x S at a time, also in the backward pass.
    Returns:
      [B, T, N, H] in q's dtype. Scores and softmax are float32.
    Raises:
      ValueError: an unknown backend.
    """
    if backend not in ("einsum", "chunked"):
        raise ValueError(f"attention backend is {backend!r}, expected 'einsum' or 'chunked'")
    if backend == "einsum" or q.shape[1] <= chunk:
        return _einsum(q, k, v, queries, keys, causal)
    t = q.shape[1]
    blocks = math.ceil(t / chunk)
    pad = blocks * chunk - t

    def split(x, fill=0):
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, chunk, *x.shape[2:]), 1, 0)

    segments = None if queries.segments is None else split(queries.segments, -1)
    block = jax.checkpoint(lambda xs: _einsum(xs[0], k, v, xs[1], keys, causal))
    out = jax.lax.map(block, (split(q), Place(split(queries.positions, -1), segments)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], blocks * chunk, *q.shape[2:])[:, :t]


def attention_weights(q, k, queries: Place, keys: Place, causal: bool) -> jax.Array:
    """float32 probabilities [B, K, T, G, S] of q [B, T, N, H] over k [B, K, S, H]."""
    weights, total = _unnormalized(q, k, queries, keys, causal)
    return weights / total


def _unnormalized(q, k, queries: Place, keys: Place, causal: bool) -> tuple[jax.Array, jax.Array]:
    """exp(scores - max) float32 [B, K, T, G, S] and its sum [B, K, T, G, 1]; this axis order needs no transpose of scores."""
    b, t, n, h = q.shape
    grouped = (q * h**-0.5).reshape(b, t, k.shape[1], n // k.shape[1], h)
    scores = jnp.einsum("btkgh,bksh->bktgs", grouped, k, preferred_element_type=jnp.float32)
    scores += jnp.where(visible(queries, keys, causal), 0.0, MASKED)[:, :, :, None]
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return weights, weights.sum(-1, keepdims=True)


def _einsum(q, k, v, queries: Place, keys: Place, causal: bool) -> jax.Array:
    weights, total = _unnormalized(q, k, queries, keys, causal)
    out = jnp.einsum("bktgs,bksh->bktgh", weights.astype(q.dtype), v, preferred_element_type=jnp.float32) / total
    return jnp.swapaxes(out, 1, 2).reshape(q.shape).astype(q.dtype)
