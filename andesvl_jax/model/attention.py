"""Attention over tokens with positions. Masks come from positions and segments, never from slot order.

B batch rows, T queries, S keys, N query heads, K kv heads, G = N / K, H head width.
"""

import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from andesvl_jax.cache import store
from andesvl_jax.cache.kv import Cache, RaggedCache
from andesvl_jax.config import ATTENTION_BACKENDS
from andesvl_jax.errors import UserError
from andesvl_jax.kernels import cpu
from andesvl_jax.model import context
from andesvl_jax.model.devices import target_platform
from andesvl_jax.model.packed import BLOCK, MASKED, packed
from andesvl_jax.model.splash import splash

FEW_QUERIES = 16  # of a row: what the compiled kernel is for
PIECES, SMALLEST_PIECE = 4, 32  # of a causal row, and tokens in one of them
MANY_KEYS, KEYS = 8192, 1024  # more than so many come in blocks of this size: the scores of a block stay in cache
LONG_ROW = 1024  # tokens of a packed row from which on skipping blocks pays for the loop over them


@struct.dataclass
class Place:
    """Where tokens stand: positions int32 [B, S] or per kv head [B, K, S], -1 = empty; segments int32 [B, S] or None."""

    positions: jax.Array
    segments: jax.Array | None = None


@struct.dataclass
class Part:
    """Keys that queries attend to, with their values.

    Attributes:
      keys, values: [B, K, S, H], arrays or other stores of a cache.
      place: where the keys stand.
      mask: bool [B, T, S], which of the visible keys a query may see (the ancestors in a draft tree); None: all.
      own: the keys are those of the queries' own tokens, in the same order, and positions rise with the slots of a segment.
    """

    keys: store.Store
    values: store.Store
    place: Place
    mask: jax.Array | None = None
    own: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class CachePart:
    """One layer of a `Cache` as a part: the compiled kernel reads it where it lies. layer: int32 []."""

    cache: Cache
    layer: jax.Array


def cache_part(cache: Cache | RaggedCache, layer: jax.Array | int) -> CachePart:
    """One layer of a cache. layer: int32 []; a `RaggedCache` needs a number that is known while tracing."""
    if isinstance(cache, RaggedCache):
        return CachePart(cache.parts[int(layer)], 0)
    return CachePart(cache, layer)


def read(part: Part | CachePart) -> Part:
    """A layer of a cache, cut out of it."""
    if isinstance(part, Part):
        return part
    cache, layer = part.cache, part.layer
    if isinstance(layer, jax.core.Tracer):
        cut = lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)  # noqa: E731
    else:
        cut = lambda x: x[int(layer)]  # noqa: E731
    keys, values, positions = jax.tree.map(cut, (cache.keys, cache.values, cache.positions))
    return Part(keys, values, Place(positions))


def visible(queries: Place, part: Part, causal: bool) -> jax.Array:
    """bool [B, 1 or K, T, S]: key present, in the query's segment, (causal) not after the query, and not masked."""
    keys = part.place
    key = keys.positions if keys.positions.ndim == 3 else keys.positions[:, None]
    key = key[:, :, None]
    mask = key >= 0
    if causal:
        mask = mask & (key <= queries.positions[:, None, :, None])
    if queries.segments is not None:
        mask = mask & (queries.segments[:, :, None] == keys.segments[:, None, :])[:, None]
    return mask if part.mask is None else mask & part.mask[:, None]


def pick(backend: str, own: bool) -> str:
    """The backend that runs for the one that the config asks for: "auto" is splash on TPU and chunked elsewhere.

    Args:
      own: the queries see their own tokens alone, without a mask. Splash serves no others: through a cache "auto" is chunked.
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


def attend(q, parts: Sequence[Part | CachePart], queries: Place, causal: bool, backend: str, chunk: int) -> jax.Array:
    """Softmax attention of q to all keys of `parts` together, with scale H^-0.5.

    Args:
      q: [B, T, N, H]; queries: where they stand.
      parts: keys and values. Where the queries and their own tokens are alone, the backends skip what causality hides.
      backend: "einsum" holds all T x S scores; "chunked" holds those of `chunk` queries at a time, also in the backward pass
        (of long packed rows on CPU those of a block, and only of keys near enough to be seen);
        "splash" (TPU) those of a block of queries and keys; "auto" as `pick`.
    Returns:
      [B, T, N, H] in q's dtype. Scores and softmax are float32.
    Raises:
      UserError, ValueError: as `pick`.
    """
    if _is_for_kernel(q, parts, causal):
        return _by_kernel(q, *parts, queries)
    parts = [read(part) for part in parts]
    parts = [part for part in parts if part.place.positions.shape[-1]] or parts[:1]
    alone = len(parts) == 1 and parts[0].own and parts[0].mask is None
    backend = pick(backend, alone)
    if not alone:
        return _blocks(q, parts, queries, causal, backend, chunk)
    (part,) = parts
    if backend == "splash":
        segments = 0 if queries.segments is None else queries.segments
        return splash(q, part.keys, part.values, jnp.where(queries.positions < 0, -1, segments), causal)
    if context.blocks() > 1:
        return _over_context(q, part, queries, causal, backend, chunk)
    if causal and backend == "chunked":
        if q.shape[1] >= LONG_ROW and queries.segments is not None and _alone_on_cpu():
            return packed(q, part.keys, part.values, queries.positions, queries.segments, min(chunk, BLOCK))
        if q.shape[1] >= PIECES * SMALLEST_PIECE:
            return _in_pieces(q, part, queries, chunk)
    return _blocks(q, parts, queries, causal, backend, chunk)


def _alone_on_cpu() -> bool:
    return target_platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1


def read_by_kernel(cache: Cache, tokens: int, width: int) -> bool:
    """Whether the C++ kernel reads this cache in place, for `tokens` queries of a row and heads of `width`."""
    return cache.compiled and tokens <= FEW_QUERIES and width % cpu.WIDTH == 0


def _is_for_kernel(q, parts: Sequence[Part | CachePart], causal: bool) -> bool:
    """Whether the C++ kernel serves these parts: a layer of a cache that it reads, then the queries' own tokens."""
    if len(parts) != 2 or not isinstance(parts[0], CachePart):
        return False
    own = isinstance(parts[1], Part) and parts[1].own
    return own and causal and read_by_kernel(parts[0].cache, q.shape[1], q.shape[3])


def _by_kernel(q, cached: CachePart, own: Part, queries: Place) -> jax.Array:
    cache = cached.cache
    keys, key_scales = store.kernel_arrays(cache.keys)
    values, value_scales = store.kernel_arrays(cache.values)
    y = cpu.few_queries(
        q.astype(jnp.float32),
        keys,
        values,
        cache.positions,
        queries.positions,
        jnp.asarray(cached.layer, jnp.int32),
        own.keys.astype(jnp.float32),
        own.values.astype(jnp.float32),
        own.mask,
        key_scales,
        value_scales,
    )
    return y.astype(q.dtype)


def _blocks(q, parts: Sequence[Part], queries: Place, causal: bool, backend: str, chunk: int) -> jax.Array:
    if backend == "einsum" or q.shape[1] <= chunk:
        return _einsum(q, parts, queries, causal)
    return _chunked(q, parts, queries, causal, chunk)


def _over_context(q, part: Part, queries: Place, causal: bool, backend: str, chunk: int) -> jax.Array:
    """Local queries attend to all-gathered keys."""

    def local_queries(q, k, v, place):
        keys = Part(context.all_tokens(k, 2), context.all_tokens(v, 2), jax.tree.map(context.all_tokens, place))
        return _blocks(q, [keys], place, causal, backend, chunk)

    return context.attend_in_parts(local_queries, q, part.keys, part.values, queries)


def _in_pieces(q, part: Part, queries: Place, chunk: int) -> jax.Array:
    """Causal attention of tokens in order, without the scores of later pieces, 3 of 8 in a square cut in four."""
    edges = [q.shape[1] * i // PIECES for i in range(PIECES + 1)]
    cut = lambda place, first, last: jax.tree.map(lambda x: x[:, first:last], place)  # noqa: E731

    def piece(first: int, last: int) -> jax.Array:
        seen = Part(part.keys[:, :, :last], part.values[:, :, :last], cut(part.place, 0, last))
        return _blocks(q[:, first:last], [seen], cut(queries, first, last), True, "chunked", chunk)

    return jnp.concatenate([piece(first, last) for first, last in zip(edges, edges[1:])], 1)


def _chunked(q, parts: Sequence[Part], queries: Place, causal: bool, chunk: int) -> jax.Array:
    """Blocks of `chunk` queries, one after the other; on CPU also one kv head after the other, so that scores stay in cache."""
    b, t, n, h = q.shape
    heads = _heads(parts[0])
    together = 1 if target_platform() == "cpu" else heads

    def split_heads(x, axis):  # K -> [K / together, ..., together, ...]
        x = x.reshape(*x.shape[:axis], heads // together, together, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def of_heads(part: Part):  # what differs between kv heads
        positions = part.place.positions if part.place.positions.ndim == 3 else None
        return jax.tree.map(lambda x: split_heads(x, 1), (part.keys, part.values, positions))

    queries = jax.tree.map(lambda x: _split(x, 1, chunk, -1), queries)
    masks = [None if part.mask is None else _split(part.mask, 1, chunk) for part in parts]

    def head(xs):  # q [T / chunk, B, chunk, together, G, H], keys and values [B, together, S, H]
        q, headed = xs
        blocks = [_key_blocks(part, *x) for part, x in zip(parts, headed, strict=True)]

        def block(x):
            q, queries, masks = x
            return _over_keys(q.reshape(b, chunk, -1, h), blocks, masks, queries, causal)

        return jax.lax.map(jax.checkpoint(block), (q, queries, masks))  # [T / chunk, B, chunk, together G, H]

    grouped = split_heads(_split(q.reshape(b, t, heads, n // heads, h), 1, chunk), 3)
    out = jax.lax.map(head, (grouped, [of_heads(part) for part in parts]))
    return jnp.moveaxis(out, (0, 1), (3, 1)).reshape(b, -1, n, h)[:, :t]


def _split(x: jax.Array, axis: int, size: int, fill: int = 0) -> jax.Array:
    """An axis in blocks of `size`, padded to whole ones, the blocks in front: [..., S, ...] -> [S / size, ..., size, ...]."""
    count = math.ceil(x.shape[axis] / size)
    rest = [(0, 0)] * x.ndim
    rest[axis] = (0, count * size - x.shape[axis])
    x = jnp.pad(x, rest, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def _key_blocks(part: Part, keys, values, positions) -> Part:
    """A part without its mask, cut into blocks of keys, [blocks, ...] in front; positions None: the part's, for all heads."""
    place = part.place if positions is None else part.place.replace(positions=positions)
    width = KEYS if place.positions.shape[-1] > MANY_KEYS else place.positions.shape[-1]
    keys, values = jax.tree.map(lambda x: _split(x, 2, width), (keys, values))
    return Part(keys, values, jax.tree.map(lambda x: _split(x, x.ndim - 1, width, -1), place))


def _over_keys(q, parts: Sequence[Part], masks: Sequence, queries: Place, causal: bool) -> jax.Array:
    """q [B, T, N, H] over parts in blocks ([blocks, ...] in front) in turn, merged by the running maximum of the scores.

    masks: bool [B, T, S] or None, one for each part.
    """
    counts = [len(part.place.positions) for part in parts]
    if all(count == 1 for count in counts):
        whole = [jax.tree.map(lambda x: x[0], part) for part in parts]
        return _einsum(q, [part.replace(mask=mask) for part, mask in zip(whole, masks, strict=True)], queries, causal)

    def step(carry, xs):
        largest, total, out = carry
        block, mask = xs
        block = block.replace(mask=mask)
        scores = _scores(q, block, queries, causal)
        larger = jnp.maximum(largest, jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        weights, shrink = jnp.exp(scores - larger), jnp.exp(largest - larger)
        values = store.mix(block.values, weights, q.dtype)
        return (larger, total * shrink + weights.sum(-1, keepdims=True), out * shrink + values), None

    b, t, n, h = q.shape
    heads = jax.tree.leaves(parts[0].keys)[0].shape[2]
    shape = (b, heads, t, n // heads)
    carry = (jnp.full((*shape, 1), MASKED), jnp.zeros((*shape, 1)), jnp.zeros((*shape, h)))
    for part, mask in zip(parts, masks, strict=True):
        mask = None if mask is None else _split(mask, 2, part.place.positions.shape[-1])
        carry, _ = jax.lax.scan(step, carry, (part, mask))
    _, total, out = carry
    return jnp.swapaxes(out / total, 1, 2).reshape(q.shape).astype(q.dtype)


def _heads(part: Part) -> int:
    """K, which every array of a store has behind B."""
    return jax.tree.leaves(part.keys)[0].shape[1]


def attention_weights(q, part: Part, queries: Place, causal: bool) -> jax.Array:
    """float32 probabilities [B, K, T, G, S] of q [B, T, N, H] over the keys of one part."""
    ((weights,), total) = _unnormalized(q, [part], queries, causal)
    return weights / total


def _unnormalized(q, parts: Sequence[Part], queries: Place, causal: bool) -> tuple[list[jax.Array], jax.Array]:
    """exp(scores - max) of each part, float32 [B, K, T, G, S], and the sum over all of them [B, K, T, G, 1]."""
    scores = [_scores(q, part, queries, causal) for part in parts]
    largest = functools.reduce(jnp.maximum, [x.max(-1, keepdims=True) for x in scores])
    weights = [jnp.exp(x - jax.lax.stop_gradient(largest)) for x in scores]
    return weights, functools.reduce(operator.add, [x.sum(-1, keepdims=True) for x in weights])


def _scores(q, part: Part, queries: Place, causal: bool) -> jax.Array:
    """float32 [B, K, T, G, S], MASKED where nothing is to be seen."""
    b, t, n, h = q.shape
    heads = _heads(part)
    grouped = (q * h**-0.5).reshape(b, t, heads, n // heads, h)
    return jnp.where(visible(queries, part, causal)[:, :, :, None], store.scores(part.keys, grouped), MASKED)


def _einsum(q, parts: Sequence[Part], queries: Place, causal: bool) -> jax.Array:
    weights, total = _unnormalized(q, parts, queries, causal)
    values = [store.mix(part.values, w, q.dtype) for part, w in zip(parts, weights, strict=True)]
    out = functools.reduce(operator.add, values) / total
    return jnp.swapaxes(out, 1, 2).reshape(q.shape).astype(q.dtype)
