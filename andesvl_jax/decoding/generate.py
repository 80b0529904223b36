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
from andesvl_jax.cache.kv import Cache, empty_cache, grow
from andesvl_jax.config import AndesVLConfig
from andesvl_jax.decoding.compact import compact
from andesvl_jax.decoding.sampling import SamplingOptions, penalize, sample
from andesvl_jax.inputs.packing import Batch, bucket
from andesvl_jax.model.andesvl import AndesVL, embed_inputs, encode_images
from andesvl_jax.model.attention import Place
from andesvl_jax.model.decoder import decode, embed_tokens, logits
from andesvl_jax.model.devices import target_platform
from andesvl_jax.weights import kernel


@struct.dataclass
class DecodingState:
    """step: int32 [], tokens made so far; tokens: int32 [B, N], stop_ids' first hit included; done: bool [B];
    last: float32 [B, V], logits of the next token; in_prompt, in_answer: bool [B, V]."""

    step: jax.Array
    tokens: jax.Array
    counts: jax.Array  # int32 [B], tokens of each row, its stop id included
    done: jax.Array
    last: jax.Array
    in_prompt: jax.Array
    in_answer: jax.Array
    cache: Cache


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
    rows, width = tokens.shape
    length = positions.max(axis=1) + 1
    x = embed_inputs(params, config, tokens, visual, visual_index)
    observe = None if eviction is None else jnp.maximum(length[:, None] - eviction.window + jnp.arange(eviction.window), 0)
    cache = empty_cache(config.text, rows, width, x.dtype)
    hidden, cache, queries = decode(params.decoder, config, x, Place(positions), cache, observe, fresh=True)
    final = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
    if eviction is not None:
        cache = compact(params.decoder, config, cache, queries, eviction)
    return logits(params.decoder, final), cache


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def decode_until(
    params: AndesVL, config: AndesVLConfig, state: DecodingState, options: SamplingOptions, stop_ids, limit
) -> DecodingState:
    """Samples and decodes until every row has met one of stop_ids int32 [S] or `limit` int32 [] steps are made."""

    def going(state: DecodingState):
        return (state.step < limit) & ~jnp.all(state.done)

    def step(state: DecodingState) -> DecodingState:
        rows = jnp.arange(state.done.shape[0])
        position = state.cache.length
        scores = penalize(state.last, options, state.in_prompt, state.in_answer)
        token = jnp.where(state.done, 0, sample(scores, options, position))
        x = embed_tokens(params.decoder, config, token[:, None])
        # a finished row still computes, but its token enters the cache as padding
        place = Place(jnp.where(state.done, -1, position)[:, None])
        hidden, cache, _ = decode(params.decoder, config, x, place, state.cache)
        return DecodingState(
            step=state.step + 1,
            tokens=state.tokens.at[:, state.step].set(token),
            counts=state.counts + ~state.done,
            done=state.done | jnp.any(token[:, None] == stop_ids, axis=1),
            last=logits(params.decoder, hidden[:, 0]),
            in_prompt=state.in_prompt,
            in_answer=state.in_answer.at[rows, token].max(~state.done),
            cache=cache,
        )

    return jax.lax.while_loop(going, step, state)


@functools.partial(jax.jit, static_argnames=("new_tokens",))
def start(last, cache: Cache, tokens, positions, new_tokens: int) -> DecodingState:
    """What `decode_until` begins with: the outcome of `prefill`, the prompts, and room for `new_tokens` more in each row."""
    rows, vocabulary = last.shape
    seen = jnp.zeros((rows, vocabulary), bool).at[jnp.arange(rows)[:, None], tokens].max(positions >= 0)
    zeros = jnp.zeros(rows, jnp.int32)
    return DecodingState(
        step=jnp.zeros((), jnp.int32), tokens=jnp.zeros((rows, new_tokens), jnp.int32), counts=zeros, done=zeros > 0,
        last=last, in_prompt=seen, in_answer=jnp.zeros_like(seen),
        cache=grow(cache, new_tokens).replace(streamed=target_platform() == "cpu" and kernel.available()),
    )  # fmt: skip


def run(
    params: AndesVL, config: AndesVLConfig, batch: Batch, options: SamplingOptions, new_tokens: int,
    stop_ids: tuple[int, ...] = (), eviction: Eviction | None = None, chunk: int | None = None,
) -> Iterator[DecodingState]:  # fmt: skip
    """Generates for prompts laid out by `assemble_prompts`; yields the state after every `chunk` tokens and at the end.

    Read a yielded state before asking for the next one: its buffers are donated.
    """
    visual = None if batch.images is None else visual_tokens(params, config, batch.images)
    last, cache = prefill(params, config, batch.tokens, batch.positions, visual, batch.visual_index, eviction)
    state = start(last, cache, batch.tokens, batch.positions, bucket(new_tokens, 16))
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
