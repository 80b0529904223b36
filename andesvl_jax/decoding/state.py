"""The state of a session and the pure functions that move it: prefill, extend, evict, decode, verify and accept.

Every function has static shapes; the state is donated where its shape stays.
B batch rows, T tokens, N new tokens, M draft nodes, A nodes with the root (M + 1), V vocabulary, W observed queries.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from andesvl_jax.cache.eviction import Eviction
from andesvl_jax.cache.kv import PICTURE, TEXT, Cache, KeyValues, append, cache_from, grow, truncate
from andesvl_jax.config import AndesVLConfig
from andesvl_jax.decoding.compact import compact, last_queries
from andesvl_jax.decoding.sampling import SamplingOptions, penalize, sample
from andesvl_jax.model.andesvl import AndesVL, embed_inputs, encode_images
from andesvl_jax.model.attention import Place
from andesvl_jax.model.decoder import decode, embed_tokens, logits


@struct.dataclass
class SessionState:
    """Where every row of a batch stands.

    Attributes:
      cache: keys and values of all tokens so far.
      next_slot: int32 [B], first cache slot of the row's next token, the same in every layer and head.
      last: float32 [B, V], logits of the next token.
      in_prompt, in_answer: bool [B, V], tokens that occur before and since the answer began.
      tokens: int32 [B, N], the answer so far, its stop id included.
      counts: int32 [B], length of the answer.
      done: bool [B], the answer has met a stop id.
      queries: [L, B, W, N, H] of the last W tokens of the last `prefill` or `extend`, rotated; None: not observed.
    """

    cache: Cache
    next_slot: jax.Array
    last: jax.Array
    in_prompt: jax.Array
    in_answer: jax.Array
    tokens: jax.Array
    counts: jax.Array
    done: jax.Array
    queries: jax.Array | None


@struct.dataclass
class Verified:
    """A draft tree after one forward pass of the target; node 0 is the token that the target itself samples next.

    Attributes:
      tokens, parents: int32 [B, A]; a parent of -1 is that of the root, -2 marks padding.
      choices: int32 [B, A], the token that the target samples after each node.
      logits: float32 [B, A, V] after each node.
      new_kv: keys and values of the nodes.
    """

    tokens: jax.Array
    parents: jax.Array
    choices: jax.Array
    logits: jax.Array
    new_kv: KeyValues


@functools.partial(jax.jit, static_argnames=("config",))
def visual_tokens(params: AndesVL, config: AndesVLConfig, images) -> jax.Array:
    """`encode_images`, compiled once per bucket of patches."""
    return encode_images(params, config, images)


@functools.partial(jax.jit, static_argnames=("config", "observe", "kind"))
def prefill(
    params: AndesVL,
    config: AndesVLConfig,
    tokens,
    positions,
    visual,
    visual_index,
    observe: int = 0,
    kind: str = "float",
) -> SessionState:
    """The state after right-padded prompts int32 [B, T], with T cache slots and no room for an answer.

    Args:
      observe: W, last queries to keep as evidence for eviction; 0: none.
      kind: of the cache, as `cache.store.encode` takes.
    """
    hidden, new_kv, queries = _run(params, config, tokens, positions, visual, visual_index, None, observe)
    cache = cache_from(new_kv, positions, _modality(visual_index), kind)
    rows, vocabulary = len(tokens), config.text.vocab_size
    seen = jnp.zeros((rows, vocabulary), bool)
    zeros = jnp.zeros(rows, jnp.int32)
    return SessionState(
        cache=cache,
        next_slot=zeros + cache.slots,  # not each row's own length: prompts of one bucket share their programs
        last=logits(params.decoder, hidden),
        in_prompt=_mark(seen, tokens, positions),
        in_answer=seen,
        tokens=jnp.zeros((rows, 0), jnp.int32),
        counts=zeros,
        done=zeros > 0,
        queries=queries,
    )


@functools.partial(jax.jit, static_argnames=("config", "observe"), donate_argnames=("state",))
def extend(
    params: AndesVL,
    config: AndesVLConfig,
    state: SessionState,
    tokens,
    positions,
    visual,
    visual_index,
    observe: int = 0,
) -> SessionState:
    """The state after further tokens int32 [B, T], which see all that the cache holds.

    Args:
      positions: int32 [B, T] counted in the whole row, -1 = padding. The caller keeps next_slot + T <= C.
    """
    hidden, new_kv, queries = _run(params, config, tokens, positions, visual, visual_index, state.cache, observe)
    slots = jnp.where(positions >= 0, state.next_slot[:, None] + jnp.arange(tokens.shape[1]), -1)
    cache = append(state.cache, new_kv, slots, positions, _modality(visual_index))
    extended = (positions >= 0).any(1)
    return state.replace(
        cache=cache,
        next_slot=state.next_slot + (positions >= 0).sum(1),
        last=jnp.where(extended[:, None], logits(params.decoder, hidden), state.last),
        in_prompt=_mark(state.in_prompt | state.in_answer, tokens, positions),
        in_answer=jnp.zeros_like(state.in_answer),
        queries=queries,
    )


@functools.partial(jax.jit, static_argnames=("config", "eviction"))
def evict(params: AndesVL, config: AndesVLConfig, state: SessionState, eviction: Eviction) -> SessionState:
    """The state with what the policy keeps of the cache; the queries of the last tokens are its evidence."""
    cache = compact(params.decoder, config, state.cache, state.queries, eviction)
    return state.replace(cache=cache, next_slot=jnp.full_like(state.next_slot, cache.slots), queries=None)


@functools.partial(jax.jit, static_argnames=("slots", "new_tokens"))
def make_room(state: SessionState, slots: int, new_tokens: int) -> SessionState:
    """The state with `slots` more cache slots and an empty answer of at most `new_tokens` tokens."""
    rows = len(state.counts)
    return state.replace(
        cache=grow(state.cache, slots) if slots else state.cache,
        tokens=jnp.zeros((rows, new_tokens), jnp.int32),
        counts=jnp.zeros_like(state.counts),
        done=jnp.zeros_like(state.done),
        in_prompt=state.in_prompt | state.in_answer,
        in_answer=jnp.zeros_like(state.in_answer),
    )


@functools.partial(jax.jit, donate_argnames=("state",))
def rewind(state: SessionState, length) -> SessionState:
    """The state without the tokens at positions >= length, int32 [B]. `last` is stale until the next `extend`."""
    cache = truncate(state.cache, length)
    return state.replace(cache=cache, next_slot=_used(cache), queries=None)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def decode_until(
    params: AndesVL, config: AndesVLConfig, state: SessionState, options: SamplingOptions, stop_ids, limit
) -> SessionState:
    """Samples and decodes until every row has met one of stop_ids int32 [S] or has `limit` int32 [] new tokens."""

    def active(state: SessionState) -> jax.Array:
        return ~state.done & (state.counts < limit)

    def step(state: SessionState) -> SessionState:
        going = active(state)
        rows, position = jnp.arange(going.shape[0]), state.cache.length
        scores = penalize(state.last, options, state.in_prompt, state.in_answer)
        token = jnp.where(going, sample(scores, options, position), 0)
        x = embed_tokens(params.decoder, config, token[:, None])
        # the other rows still compute, but as padding that no slot takes
        positions = jnp.where(going, position, -1)[:, None]
        decoded = decode(params.decoder, config, x, Place(positions), state.cache)
        slots = jnp.where(going, state.next_slot, -1)[:, None]
        written = jnp.where(going, state.counts, state.tokens.shape[1])  # behind the last column: dropped
        return state.replace(
            tokens=state.tokens.at[rows, written].set(token, mode="drop"),
            counts=state.counts + going,
            next_slot=state.next_slot + going,
            done=state.done | (going & jnp.any(token[:, None] == stop_ids, axis=1)),
            last=jnp.where(going[:, None], logits(params.decoder, decoded.hidden[:, 0]), state.last),
            in_answer=state.in_answer.at[rows, token].max(going),
            cache=append(state.cache, decoded.new_kv, slots, positions, jnp.full_like(positions, TEXT)),
        )

    return jax.lax.while_loop(lambda state: jnp.any(active(state)), step, state)


@functools.partial(jax.jit, static_argnames=("config",))
def verify(params: AndesVL, config: AndesVLConfig, state: SessionState, tokens, parents, options: SamplingOptions) -> Verified:
    """Runs a draft tree behind the next token in one pass; the cache is read and not written.

    Args:
      tokens: int32 [B, M], drafted tokens.
      parents: int32 [B, M], the node that a token follows, counted from 0 in `tokens` and smaller than its own number; -1: the
        token that the target samples next; -2: padding.
    """
    rows, drafted = tokens.shape
    root = sample(penalize(state.last, options, state.in_prompt, state.in_answer), options, state.cache.length)
    tokens = jnp.concatenate([root[:, None], tokens], 1)
    parents = jnp.concatenate([jnp.full((rows, 1), -1), jnp.where(parents < -1, -2, parents + 1)], 1)
    present = parents > -2
    own = jnp.eye(drafted + 1, dtype=bool)

    def with_parent(node, ancestors):  # bool [B, A, A]: row n marks n and the nodes above it
        parent = jax.lax.dynamic_index_in_dim(parents, node, 1, keepdims=False)
        above = jnp.take_along_axis(ancestors, jnp.maximum(parent, 0)[:, None, None], 1)[:, 0]
        line = (above & (parent >= 0)[:, None]) | own[node]
        return jax.lax.dynamic_update_index_in_dim(ancestors, line, node, 1)

    ancestors = jax.lax.fori_loop(0, drafted + 1, with_parent, jnp.broadcast_to(own, (rows, drafted + 1, drafted + 1)))
    depth = ancestors.sum(-1) - 1
    positions = jnp.where(present, state.cache.length[:, None] + depth, -1)
    x = embed_tokens(params.decoder, config, tokens)
    decoded = decode(params.decoder, config, x, Place(positions), state.cache, mask=ancestors)
    scores = logits(params.decoder, decoded.hidden)
    hot = jax.nn.one_hot(tokens, scores.shape[-1], dtype=bool)
    on_path = jnp.einsum("bnm,bmv->bnv", ancestors.astype(jnp.int8), hot.astype(jnp.int8)) > 0
    penalized = penalize(scores, options, state.in_prompt[:, None], state.in_answer[:, None] | on_path)
    choices = sample(penalized, options, positions + 1)
    return Verified(tokens, parents, choices, scores, decoded.new_kv)


@functools.partial(jax.jit, donate_argnames=("state",))
def accept(state: SessionState, verified: Verified, stop_ids, limit) -> SessionState:
    """The state after the longest path of nodes that the target itself would have sampled: what plain decoding gives.

    Args:
      stop_ids: int32 [S]; limit: int32 [], new tokens at most. The caller keeps next_slot + A <= C.
    """
    rows, nodes = verified.tokens.shape
    each = jnp.arange(rows)

    def walk(i, carry):
        path, current, target, going = carry
        follows = (verified.parents == current[:, None]) & (verified.tokens == target[:, None])
        going = going & follows.any(1) & (state.counts + i < limit)
        node = jnp.where(going, jnp.argmax(follows, 1), current)
        token = verified.tokens[each, node]
        path = path.at[:, i].set(jnp.where(going, node, -1))
        target = jnp.where(going, verified.choices[each, node], target)
        going = going & ~jnp.any(token[:, None] == stop_ids, axis=1)
        return path, node, target, going

    start = jnp.full((rows, nodes), -1), jnp.full(rows, -1), verified.tokens[:, 0], ~state.done
    path, *_ = jax.lax.fori_loop(0, nodes, walk, start)
    taken, node = path >= 0, jnp.maximum(path, 0)
    count = taken.sum(1)
    tokens = jnp.where(taken, jnp.take_along_axis(verified.tokens, node, 1), 0)
    of_path = functools.partial(jnp.take_along_axis, indices=node[None, :, None, :, None], axis=3)
    new_kv = KeyValues(of_path(verified.new_kv.keys), of_path(verified.new_kv.values))
    steps = jnp.arange(nodes)
    positions = jnp.where(taken, state.cache.length[:, None] + steps, -1)
    slots = jnp.where(taken, state.next_slot[:, None] + steps, -1)
    written = jnp.where(taken, state.counts[:, None] + steps, state.tokens.shape[1])
    final = jnp.take_along_axis(node, jnp.maximum(count - 1, 0)[:, None], 1)[:, 0]
    return state.replace(
        tokens=state.tokens.at[each[:, None], written].set(tokens, mode="drop"),
        counts=state.counts + count,
        next_slot=state.next_slot + count,
        done=state.done | (taken & (tokens[..., None] == stop_ids).any(-1)).any(1),
        last=jnp.where((count > 0)[:, None], verified.logits[each, final], state.last),
        in_answer=state.in_answer.at[each[:, None], tokens].max(taken),
        cache=append(state.cache, new_kv, slots, positions, jnp.full_like(positions, TEXT)),
    )


def _run(params: AndesVL, config: AndesVLConfig, tokens, positions, visual, visual_index, cache, observe: int):
    """Hidden state [B, D] of each row's last token, keys and values, and the observed queries or None."""
    count = (positions >= 0).sum(1)
    x = embed_inputs(params, config, tokens, visual, visual_index)
    tap = last_queries(count, observe) if observe else None
    decoded = decode(params.decoder, config, x, Place(positions), cache, tap=tap)
    hidden = jnp.take_along_axis(decoded.hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return hidden, decoded.new_kv, decoded.taps


def _modality(visual_index: jax.Array) -> jax.Array:
    return jnp.where(visual_index >= 0, PICTURE, TEXT)


def _mark(seen: jax.Array, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    return seen.at[jnp.arange(len(tokens))[:, None], tokens].max(positions >= 0)


def _used(cache: Cache) -> jax.Array:
    """int32 [B]: slots up to the last one that holds a token in any layer and head."""
    used = (cache.positions >= 0).any((0, 2))
    return jnp.max(jnp.where(used, jnp.arange(1, cache.slots + 1), 0), axis=-1, initial=0).astype(jnp.int32)
