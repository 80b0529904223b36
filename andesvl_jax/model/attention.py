"""Attention over tokens that know where they stand. Masks come from positions and segments, never from slot order.

B batch rows, T queries, S keys, N query heads, K kv heads, G = N / K, H head width.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

from andesvl_jax.cache.kv import Cache
from andesvl_jax.config import ATTENTION_BACKENDS
from andesvl_jax.errors import UserError
from andesvl_jax.model import context
from andesvl_jax.model.devices import target_platform
from andesvl_jax.model.packed import BLOCK, MASKED, packed
from andesvl_jax.model.splash import splash
from andesvl_jax.weights import kernel

FEW_QUERIES = 16  # of a row: what the compiled kernel is for
PIECES, SMALLEST_PIECE = 4, 32  # of a causal row, and tokens in one of them
MANY_KEYS, KEYS = 8192, 1024  # more than so many come in blocks of this size: the scores of a block stay in cache
LONG_ROW = 1024  # tokens of a packed row from which on skipping blocks pays for the loop over them


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


def pick(backend: str, own: bool) -> str:
    """The backend that runs for the one that the config asks for: "auto" is splash on TPU and chunked elsewhere.

    Args:
      own: the keys are those of the queries' own tokens, in the same slots. Splash sees no others: through a cache "auto" is
        chunked.
    Raises:
      UserError: splash for another platform than TPU, or through a cache.
      ValueError: an unknown backend.
    """
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"attention backend is {backend!r}, expected one of {ATTENTION_BACKENDS}")
    platform = target_platform()
    if backend == "auto":
        return "splash" if own and platform == "tpu" else "chunked"
    if backend == "splash" and platform != "tpu":
        raise UserError(f"config field attention: found 'splash', a kernel for TPU, on {platform}; expected 'auto' or 'chunked'.")
    if backend == "splash" and not own:
        raise UserError("config field attention: found 'splash', which reads no cache; expected 'auto' or 'chunked' to decode.")
    return backend


def attend(q, k, v, queries: Place, keys: Place, causal: bool, backend: str, chunk: int) -> jax.Array:
    """Softmax attention with scale H^-0.5.

    Args:
      q: [B, T, N, H]; k, v: [B, K, S, H]; queries, keys: where each stands. One and the same Place says that the keys are those
        of the queries' own tokens, whose positions rise with the slots of a segment.
      backend: "einsum" holds all T x S scores; "chunked" holds those of `chunk` queries at a time, also in the backward pass
        (of long packed rows on CPU those of a block, and only of keys near enough to be seen);
        "splash" (TPU) those of a block of queries and keys; "auto" as `pick`.
    Returns:
      [B, T, N, H] in q's dtype. Scores and softmax are float32.
    Raises:
      UserError, ValueError: as `pick`.
    """
    own = queries is keys
    backend = pick(backend, own)
    if backend == "splash":
        segments = 0 if queries.segments is None else queries.segments
        return splash(q, k, v, jnp.where(queries.positions < 0, -1, segments), causal)
    if own and context.blocks() > 1:
        return _over_context(q, k, v, queries, causal, backend, chunk)
    if own and causal and backend == "chunked":
        if q.shape[1] >= LONG_ROW and queries.segments is not None and _alone_on_cpu():
            return packed(q, k, v, queries.positions, queries.segments, min(chunk, BLOCK))
        if q.shape[1] >= PIECES * SMALLEST_PIECE:
            return _in_pieces(q, k, v, queries, chunk)
    return _blocks(q, k, v, queries, keys, causal, backend, chunk)


def _alone_on_cpu() -> bool:
    return target_platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1


def _blocks(q, k, v, queries: Place, keys: Place, causal: bool, backend: str, chunk: int) -> jax.Array:
    if backend == "einsum" or q.shape[1] <= chunk:
        return _einsum(q, k, v, queries, keys, causal)
    return _chunked(q, k, v, queries, keys, causal, chunk)


def _over_context(q, k, v, place: Place, causal: bool, backend: str, chunk: int) -> jax.Array:
    """Own queries over the keys of the whole row."""

    def own_queries(q, k, v, place):
        k, v, keys = context.all_tokens(k, 2), context.all_tokens(v, 2), jax.tree.map(context.all_tokens, place)
        return _blocks(q, k, v, place, keys, causal, backend, chunk)

    return context.attend_in_parts(own_queries, q, k, v, place)


def _in_pieces(q, k, v, place: Place, chunk: int) -> jax.Array:
    """Causal attention of tokens in order, without the scores of later pieces, 3 of 8 in a square cut in four."""
    edges = [q.shape[1] * i // PIECES for i in range(PIECES + 1)]
    of = lambda first, last: jax.tree.map(lambda x: x[:, first:last], place)  # noqa: E731
    pieces = [
        _blocks(q[:, first:last], k[:, :, :last], v[:, :, :last], of(first, last), of(0, last), True, "chunked", chunk)
        for first, last in zip(edges, edges[1:])
    ]
    return jnp.concatenate(pieces, 1)


def _chunked(q, k, v, queries: Place, keys: Place, causal: bool, chunk: int) -> jax.Array:
    """Blocks of `chunk` queries, one after the other; on CPU also one kv head after the other, so that scores stay in cache."""
    b, t, n, h = q.shape
    heads = k.shape[1]
    together = 1 if target_platform() == "cpu" else heads
    of_head = keys.positions.ndim == 3

    def split_heads(x, axis):  # K -> [K / together, ..., together, ...]
        x = x.reshape(*x.shape[:axis], heads // together, together, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def place_blocks(place, size):  # None stays None
        return Place(_split(place.positions, place.positions.ndim - 1, size, -1), _split(place.segments, 1, size, -1))

    queries = place_blocks(queries, chunk)
    width = KEYS if k.shape[2] > MANY_KEYS else k.shape[2]

    def head(xs):  # q [T, ..., B], k, v [B, together, S, H]
        q, k, v, positions = xs
        seen = place_blocks(Place(positions if of_head else keys.positions, keys.segments), width)
        blocks = (_split(k, 2, width), _split(v, 2, width), seen)
        block = lambda x: _over_keys(x[0].reshape(b, chunk, -1, h), blocks, x[1], causal)  # noqa: E731
        return jax.lax.map(jax.checkpoint(block), (q, queries))  # [T / chunk, B, chunk, together G, H]

    grouped = split_heads(_split(q.reshape(b, t, heads, n // heads, h), 1, chunk), 3)
    slots = split_heads(keys.positions, 1) if of_head else None
    out = jax.lax.map(head, (grouped, split_heads(k, 1), split_heads(v, 1), slots))
    return jnp.moveaxis(out, (0, 1), (3, 1)).reshape(b, -1, n, h)[:, :t]


def _split(x: jax.Array | None, axis: int, size: int, fill: int = 0) -> jax.Array | None:
    """An axis in blocks of `size`, padded to whole ones, the blocks in front: [..., S, ...] -> [S / size, ..., size, ...]."""
    if x is None:
        return None
    count = math.ceil(x.shape[axis] / size)
    rest = [(0, 0)] * x.ndim
    rest[axis] = (0, count * size - x.shape[axis])
    x = jnp.pad(x, rest, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def _over_keys(q, blocks, queries: Place, causal: bool) -> jax.Array:
    """q [B, T, N, H] over blocks (k, v [blocks, B, K, S, H], Place) in turn, the maximum of the scores as known so far."""
    if len(blocks[0]) == 1:
        k, v, keys = jax.tree.map(lambda x: x[0], blocks)
        return _einsum(q, k, v, queries, keys, causal)

    def step(carry, block):
        largest, total, out = carry
        k, v, keys = block
        scores = _scores(q, k, queries, keys, causal)
        larger = jnp.maximum(largest, jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        weights, shrink = jnp.exp(scores - larger), jnp.exp(largest - larger)
        values = jnp.einsum("bktgs,bksh->bktgh", weights.astype(q.dtype), v, preferred_element_type=jnp.float32)
        return (larger, total * shrink + weights.sum(-1, keepdims=True), out * shrink + values), None

    b, t, n, h = q.shape
    heads = blocks[0].shape[2]
    shape = (b, heads, t, n // heads)
    first = (jnp.full((*shape, 1), MASKED), jnp.zeros((*shape, 1)), jnp.zeros((*shape, h)))
    (_, total, out), _ = jax.lax.scan(step, first, blocks)
    return jnp.swapaxes(out / total, 1, 2).reshape(q.shape).astype(q.dtype)


def attend_cache(q, cache: Cache, layer: jax.Array, positions: jax.Array, backend: str, chunk: int) -> jax.Array:
    """Causal `attend` of q [B, T, N, H] at int32 positions [B, T] over one layer, int32 [], of a cache -> [B, T, N, H]."""
    if cache.streamed and q.shape[1] <= FEW_QUERIES and q.shape[3] % kernel.WIDTH == 0:
        y = kernel.few_queries(q.astype(jnp.float32), cache.keys, cache.values, cache.positions, positions, layer)
        return y.astype(q.dtype)
    k, v, slots = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (cache.keys, cache.values, cache.positions))
    return attend(q, k.astype(q.dtype), v.astype(q.dtype), Place(positions), Place(slots), True, backend, chunk)


def attention_weights(q, k, queries: Place, keys: Place, causal: bool) -> jax.Array:
    """float32 probabilities [B, K, T, G, S] of q [B, T, N, H] over k [B, K, S, H]."""
    weights, total = _unnormalized(q, k, queries, keys, causal)
    return weights / total


def _unnormalized(q, k, queries: Place, keys: Place, causal: bool) -> tuple[jax.Array, jax.Array]:
    """exp(scores - max) float32 [B, K, T, G, S] and its sum [B, K, T, G, 1]."""
    scores = _scores(q, k, queries, keys, causal)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return weights, weights.sum(-1, keepdims=True)


def _scores(q, k, queries: Place, keys: Place, causal: bool) -> jax.Array:
    """float32 [B, K, T, G, S], MASKED where nothing is to be seen; this axis order needs no transpose."""
    b, t, n, h = q.shape
    grouped = (q * h**-0.5).reshape(b, t, k.shape[1], n // k.shape[1], h)
    scores = jnp.einsum("btkgh,bksh->bktgs", grouped, k, preferred_element_type=jnp.float32)
    return jnp.where(visible(queries, keys, causal)[:, :, :, None], scores, MASKED)


def _einsum(q, k, v, queries: Place, keys: Place, causal: bool) -> jax.Array:
    weights, total = _unnormalized(q, k, queries, keys, causal)
    out = jnp.einsum("bktgs,bksh->bktgh", weights.astype(q.dtype), v, preferred_element_type=jnp.float32) / total
    return jnp.swapaxes(out, 1, 2).reshape(q.shape).astype(q.dtype)
