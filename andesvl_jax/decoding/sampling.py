"""From logits to the next token. B batch rows, V vocabulary."""

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
    """logits float32 [B, V] with penalties; in_prompt, in_answer: bool [B, V], tokens that occurred."""
    penalty = options.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(in_prompt | in_answer, repeated, logits)
    return logits - options.presence_penalty[:, None] * in_answer


def filter_logits(logits, options: SamplingOptions) -> jax.Array:
    """Temperature, then top-k, then top-p, as `transformers` orders them; excluded tokens become -inf. float32 [B, V]."""
    vocabulary = logits.shape[-1]
    logits = logits / jnp.where(options.temperature > 0, options.temperature, 1.0)[:, None]
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    k = jnp.where(options.top_k > 0, jnp.minimum(options.top_k, vocabulary), vocabulary)
    ordered = jnp.where(jnp.arange(vocabulary) < k[:, None], ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_p = options.top_p[:, None]
    kept = ((before < top_p) | (top_p >= 1)).at[:, 0].set(True) & jnp.isfinite(ordered)  # rounding may bring `before` to 1
    floor = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= floor, logits, -jnp.inf)


def sample(logits, options: SamplingOptions, positions) -> jax.Array:
    """int32 [B] next tokens. The noise of a row depends on its seed and the token's position [B] alone, so the same
    position draws the same noise whatever path led to it (speculative decoding relies on this)."""
    greedy = jnp.argmax(logits, axis=-1)

    def draw(_):
        noise = jax.vmap(
            lambda seed, position: jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), logits.shape[-1:])
        )(options.seeds, positions)
        return jnp.argmax(filter_logits(logits, options) + noise, axis=-1)

    drawn = jax.lax.cond(jnp.any(options.temperature > 0), draw, lambda _: greedy, None)
    return jnp.where(options.temperature > 0, drawn, greedy).astype(jnp.int32)
