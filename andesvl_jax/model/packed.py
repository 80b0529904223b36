"""Attention over packed rows on CPU: blocks of queries meet only those blocks of keys that hold their segments.

A row of many short conversations costs as much as they would alone, not the square of the row. The forward pass keeps the sums of
the softmax and the backward pass makes the weights anew (Dao et al., arXiv 2205.14135).
B batch rows, T tokens, N query heads, K kv heads, G = N / K, H head width, C tokens of a block, W blocks of keys.
"""

from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 128  # tokens that are fastest together
MASKED = -1e30  # finite, so that a padding query (nothing visible) yields a mean of values, not NaN


def packed(q, k, v, positions, segments, block: int) -> jax.Array:
    """Causal softmax attention of a row's tokens over each other, with scale H^-0.5.

    Args:
      q: [B, T, N, H]; k, v: [B, K, T, H]; positions, segments: int32 [B, T], both -1 for padding. Positions rise with the slots
        of a segment. Segments may stand in any order; the fewer blocks each touches, the less work.
    Returns:
      [B, T, N, H] in q's dtype. Scores and softmax are float32.
    """
    b, t, n, h = q.shape
    pad = -t % block
    fill = lambda x, axis, value=0: jnp.pad(x, [(0, pad * (i == axis)) for i in range(x.ndim)], constant_values=value)  # noqa: E731
    q, k, v = fill(q, 1), fill(k, 2), fill(v, 2)
    positions, segments = fill(positions, 1, -1), fill(segments, 1, -1)
    blocks = q.reshape(b, -1, block, k.shape[1], n // k.shape[1], h).transpose(0, 1, 3, 2, 4, 5)  # [B, T / C, K, C, G, H]
    out = jax.lax.map(lambda row: _row(*row), (blocks, k, v, positions, segments))
    return out.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, n, h)[:, :t]


@jax.custom_vjp
def _row(q, k, v, positions, segments) -> jax.Array:
    """q [T / C, K, C, G, H] over k, v [K, T, H] of one row -> like q."""
    return _forward(q, k, v, positions, segments)[0]


def _forward(q, k, v, positions, segments) -> tuple[jax.Array, Any]:
    def step(x):
        def meet(width, start):
            part = _keys(start, width, q.shape[2], k, v, positions, segments)
            scores = _scores(x, part)
            largest = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - largest)
            total = weights.sum(-1, keepdims=True)
            values = jnp.einsum("kcgs,ksh->kcgh", weights.astype(v.dtype), part[1], preferred_element_type=jnp.float32)
            return (values / total).astype(q.dtype), largest + jnp.log(total)

        return _by_width(meet, x, len(q))

    parts = _parts(q, positions, segments)
    out, sums = jax.lax.map(step, parts)
    return out, (q, k, v, positions, segments, out, sums)


def _backward(kept: Any, grad: jax.Array) -> tuple[Any, ...]:
    q, k, v, positions, segments, out, sums = kept
    size, h = q.shape[2], q.shape[-1]

    def step(carry, xs):
        x, grad, out, sums = xs
        mean = (grad.astype(jnp.float32) * out).sum(-1, keepdims=True)

        def meet(width, start):
            part = _keys(start, width, size, k, v, positions, segments)
            weights = jnp.exp(_scores(x, part) - sums)
            dv = jnp.einsum("kcgs,kcgh->ksh", weights.astype(q.dtype), grad, preferred_element_type=jnp.float32)
            above = jnp.einsum("kcgh,ksh->kcgs", grad, part[1], preferred_element_type=jnp.float32)
            scores = (weights * (above - mean) * h**-0.5).astype(q.dtype)
            dq = jnp.einsum("kcgs,ksh->kcgh", scores, part[0], preferred_element_type=jnp.float32)
            dk = jnp.einsum("kcgs,kcgh->ksh", scores, x[0], preferred_element_type=jnp.float32)
            return dq.astype(q.dtype), _add(carry[0], dk, start), _add(carry[1], dv, start)

        dq, dk, dv = _by_width(meet, x, len(q))
        return (dk, dv), dq

    zero = jnp.zeros_like(k).astype(jnp.float32)
    parts = _parts(q, positions, segments)
    (dk, dv), dq = jax.lax.scan(step, (zero, zero), (parts, grad, out, sums))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_row.defvjp(_forward, _backward)


def _parts(q, positions, segments) -> Any:
    """For every block of queries: (q, positions, segments, first block of keys it can see, how many from there on)."""
    count = len(q)
    positions, segments = positions.reshape(count, -1), segments.reshape(count, -1)
    last_ones = jnp.where(segments < 0, jnp.iinfo(segments.dtype).max, segments)  # padding, at the end of a row, numbers last
    low, high = last_ones.min(1), last_ones.max(1)
    seen = (low[:, None] <= high) & (low <= high[:, None]) & jnp.tri(count, dtype=bool)
    first, last = jnp.argmax(seen, 1), count - 1 - jnp.argmax(seen[:, ::-1], 1)
    return q, positions, segments, first, last - first + 1


def _by_width(meet, x, count: int) -> Any:
    """meet(W, first slot) for the smallest W of 1, 2, 4, ... blocks that holds all that x, of `_parts`, can see."""
    widths = [min(1 << i, count) for i in range((count - 1).bit_length() + 1)]
    size = x[0].shape[1]
    branches = [lambda first, w=w: meet(w, jnp.minimum(first, count - w) * size) for w in widths]
    return jax.lax.switch(jnp.searchsorted(jnp.array(widths), x[4]), branches, x[3])


def _keys(start, width: int, size: int, k, v, positions, segments) -> Any:
    cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, width * size, axis)  # noqa: E731
    return cut(k, 1), cut(v, 1), cut(positions, 0), cut(segments, 0)


def _scores(x, part) -> jax.Array:
    """float32 [K, C, G, W C], MASKED where nothing is to be seen."""
    q, q_positions, q_segments, *_ = x
    k, _, positions, segments = part
    mask = (q_segments[:, None] == segments) & (positions >= 0) & (positions <= q_positions[:, None])
    scores = jnp.einsum("kcgh,ksh->kcgs", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None], scores, MASKED)


def _add(total, part, start) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(
        total, jax.lax.dynamic_slice_in_dim(total, start, part.shape[1], 1) + part, start, 1
    )
