"""Batched prefill and decode with static shapes: a typed state in `lax.while_loop`, the state donated from call to call.

B batch rows, T prompt bucket, N new tokens, V vocabulary, C cache slots, W observed queries.
"""

import functools
from typing import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from andesvl_jax.cache.eviction import Eviction
from andesvl_jax.cache.kv import PICTURE, TEXT, Cache, append, cache_from, grow
from andesvl_jax.config import AndesVLConfig
from andesvl_jax.decoding.compact import compact, last_queries
from andesvl_jax.decoding.sampling import SamplingOptions, penalize, sample
from andesvl_jax.inputs.packing import Batch, bucket
from andesvl_jax.kernels import cpu
from andesvl_jax.model.andesvl import AndesVL, embed_inputs, encode_images
from andesvl_jax.model.attention import Place
from andesvl_jax.model.decoder import decode, embed_tokens, logits
from andesvl_jax.model.devices import target_platform


@struct.dataclass
class DecodingState:
    """Where every row of a batch stands.

    Attributes:
      tokens: int32 [B, N], new tokens, the stop id included.
      counts: int32 [B], how many each row has.
      next_slot: int32 [B], slot of the cache that the row's next token takes, the same in every layer and head.
      done: bool [B].
      last: float32 [B, V], logits of the next token.
      in_prompt, in_answer: bool [B, V], tokens that occur.
    """

    tokens: jax.Array
    counts: jax.Array
    next_slot: jax.Array
    done: jax.Array
    last: jax.Array
    in_prompt: jax.Array
    in_answer: jax.Array
    cache: Cache


def compiled_cache() -> bool:
    """Whether the cache of a decoding loop goes through the C++ kernels: on one CPU device, where they can be built."""
    alone = jax.sharding.get_abstract_mesh().size <= 1
    return target_platform() == "cpu" and alone and cpu.available()


@functools.partial(jax.jit, static_argnames=("config",))
def visual_tokens(params: AndesVL, config: AndesVLConfig, images) -> jax.Array:
    """`encode_images`, compiled once per bucket of patches."""
    return encode_images(params, config, images)


@functools.partial(jax.jit, static_argnames=("config", "eviction"))
def prefill(
    params: AndesVL, config: AndesVLConfig, tokens, positions, visual, visual_index, eviction: Eviction | None = None
) -> tuple[jax.Array, Cache]:
    """Runs right-padded prompts int32 [B, T] and keeps what the policy keeps.

    Returns:
      last: float32 [B, V], logits after each row's last token; cache with T slots, or the policy's number.
    """
    length = positions.max(axis=1) + 1
    x = embed_inputs(params, config, tokens, visual, visual_index)
    tap = None if eviction is None else last_queries(length, eviction.window)
    decoded = decode(params.decoder, config, x, Place(positions), tap=tap)
    final = jnp.take_along_axis(decoded.hidden, (length - 1)[:, None, None], axis=1)[:, 0]
    cache = cache_from(decoded.new_kv, positions, jnp.where(visual_index >= 0, PICTURE, TEXT))
    if eviction is not None:
        cache = compact(params.decoder, config, cache, decoded.taps, eviction)
    return logits(params.decoder, final), cache


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def decode_until(
    params: AndesVL, config: AndesVLConfig, state: DecodingState, options: SamplingOptions, stop_ids, limit
) -> DecodingState:
    """Samples and decodes until every row has met one of stop_ids int32 [S] or has `limit` int32 [] new tokens."""

    def active(state: DecodingState) -> jax.Array:
        return ~state.done & (state.counts < limit)

    def step(state: DecodingState) -> DecodingState:
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
        return DecodingState(
            tokens=state.tokens.at[rows, written].set(token, mode="drop"),
            counts=state.counts + going,
            next_slot=state.next_slot + going,
            done=state.done | (going & jnp.any(token[:, None] == stop_ids, axis=1)),
            last=jnp.where(going[:, None], logits(params.decoder, decoded.hidden[:, 0]), state.last),
            in_prompt=state.in_prompt,
            in_answer=state.in_answer.at[rows, token].max(going),
            cache=append(state.cache, decoded.new_kv, slots, positions, jnp.full_like(positions, TEXT)),
        )

    return jax.lax.while_loop(lambda state: jnp.any(active(state)), step, state)


@functools.partial(jax.jit, static_argnames=("new_tokens", "compiled"))
def start(last, cache: Cache, tokens, positions, new_tokens: int, compiled: bool = False) -> DecodingState:
    """What `decode_until` begins with: the outcome of `prefill`, the prompts, and room for `new_tokens` more in each row.

    compiled: as `Cache.compiled`; `compiled_cache` says it before tracing.
    """
    rows, vocabulary = last.shape
    seen = jnp.zeros((rows, vocabulary), bool).at[jnp.arange(rows)[:, None], tokens].max(positions >= 0)
    zeros = jnp.zeros(rows, jnp.int32)
    return DecodingState(
        tokens=jnp.zeros((rows, new_tokens), jnp.int32),
        counts=zeros,
        next_slot=jnp.full_like(zeros, cache.slots),
        done=zeros > 0,
        last=last,
        in_prompt=seen,
        in_answer=jnp.zeros_like(seen),
        cache=grow(cache, new_tokens).replace(compiled=compiled),
    )


def run(
    params: AndesVL, config: AndesVLConfig, batch: Batch, options: SamplingOptions, new_tokens: int,
    stop_ids: tuple[int, ...] = (), eviction: Eviction | None = None, chunk: int | None = None,
) -> Iterator[DecodingState]:  # fmt: skip
    """Generates for prompts laid out by `assemble_prompts`; yields the state after every `chunk` tokens and at the end.

    Read a yielded state before asking for the next one: its buffers are donated.
    """
    visual = None if batch.images is None else visual_tokens(params, config, batch.images)
    last, cache = prefill(params, config, batch.tokens, batch.positions, visual, batch.visual_index, eviction)
    state = start(last, cache, batch.tokens, batch.positions, bucket(new_tokens, 16), compiled_cache())
    stops = jnp.asarray(stop_ids or (-1,), jnp.int32)
    chunk = chunk or new_tokens
    for limit in range(chunk, new_tokens + chunk, chunk):
        state = decode_until(params, config, state, options, stops, min(limit, new_tokens))
        yield state
        if bool(state.done.all()):
            return


def new_tokens_of(state: DecodingState) -> list[np.ndarray]:
    """Each row's new tokens, int32, its stop id included."""
    tokens, counts = np.asarray(state.tokens), np.asarray(state.counts)
    return [row[:n] for row, n in zip(tokens, counts, strict=True)]
