"""From logits to the next token. B batch rows, V vocabulary; a draft tree has an axis of nodes between the two."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class SamplingOptions:
    """Per-row controls, all traced, so that no change of them recompiles.

    temperature: float32 [B], 0 = greedy; top_k: int32 [B], 0 = all; top_p: float32 [B], 1 = all; repetition_penalty: float32
    [B], 1 = none (divides positive and multiplies negative logits of tokens seen in prompt or answer); presence_penalty:
    float32 [B], 0 = none (subtracted from tokens seen in the answer); seeds: int32 [B].
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    seeds: jax.Array


def sampling_options(
    rows: int, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0, presence_penalty=0.0, seed=0
) -> SamplingOptions:
    """Scalars or per-row sequences -> SamplingOptions. A scalar seed gives row b the seed `seed + b`."""
    spread = lambda x, dtype: jnp.broadcast_to(jnp.asarray(x, dtype), (rows,))  # noqa: E731
    seeds = jnp.asarray(seed, jnp.int32)
    return SamplingOptions(
        spread(temperature, jnp.float32), spread(top_k, jnp.int32), spread(top_p, jnp.float32),
        spread(repetition_penalty, jnp.float32), spread(presence_penalty, jnp.float32),
        seeds + jnp.arange(rows) if seeds.ndim == 0 else seeds,
    )  # fmt: skip


def penalize(logits, options: SamplingOptions, in_prompt, in_answer) -> jax.Array:
    """logits float32 [B, ..., V] with penalties.

    Args:
      in_prompt, in_answer: bool [B, ..., V], tokens that occurred; of a draft node also those on its own path.
    """
    penalty = _for_each(options.repetition_penalty, logits)
    repeated = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(in_prompt | in_answer, repeated, logits)
    return logits - _for_each(options.presence_penalty, logits) * in_answer


def filter_logits(logits, options: SamplingOptions) -> jax.Array:
    """float32 [B, ..., V] after temperature, then top-k, then top-p, as `transformers` orders them; excluded tokens are -inf."""
    vocabulary = logits.shape[-1]
    temperature = _for_each(options.temperature, logits)
    logits = logits / jnp.where(temperature > 0, temperature, 1.0)
    ordered = jnp.flip(jnp.sort(logits, axis=-1), -1)
    top_k = _for_each(options.top_k, logits)
    k = jnp.where(top_k > 0, jnp.minimum(top_k, vocabulary), vocabulary)
    ordered = jnp.where(jnp.arange(vocabulary) < k, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_p = _for_each(options.top_p, logits)
    within = ((before < top_p) | (top_p >= 1)).at[..., 0].set(True)  # rounding may bring `before` to 1
    lowest = jnp.min(jnp.where(within & jnp.isfinite(ordered), ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def sample(logits, options: SamplingOptions, positions) -> jax.Array:
    """int32 [B, ...] next tokens of logits float32 [B, ..., V].

    The noise depends on the row's seed and the token's position, int32 [B, ...], alone: whatever path leads to a position draws
    the same noise, so that a draft tree is verified against the very tokens of plain decoding.
    """
    greedy = jnp.argmax(logits, axis=-1)

    def draw(_):
        keys = jax.vmap(jax.random.key)(options.seeds)
        rows = positions.reshape(len(positions), -1)
        noise = jax.vmap(lambda key, row: jax.vmap(lambda at: _noise(key, at, logits.shape[-1]))(row))(keys, rows)
        return jnp.argmax(filter_logits(logits, options) + noise.reshape(logits.shape), axis=-1)

    drawn = jax.lax.cond(jnp.any(options.temperature > 0), draw, lambda _: greedy, None)
    return jnp.where(_for_each(options.temperature, greedy) > 0, drawn, greedy).astype(jnp.int32)


def _noise(key: jax.Array, position: jax.Array, vocabulary: int) -> jax.Array:
    return jax.random.gumbel(jax.random.fold_in(key, position), (vocabulary,))


def _for_each(option: jax.Array, x: jax.Array) -> jax.Array:
    """An option [B] in the number of dimensions of x [B, ...]."""
    return option.reshape(-1, *[1] * (x.ndim - 1))
