"""Losses. B batch rows, T tokens, M supervised tokens of a row, D width, V vocabulary."""

import jax
import jax.numpy as jnp

from andesvl_jax.model.andesvl import AndesVL
from andesvl_jax.model.decoder import logits


def cross_entropy(
    params: AndesVL, hidden: jax.Array, slots: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int = 1024
):
    """Weighted sum of next-token cross-entropy over supervised tokens, and the sum of their weights.

    Logits exist for supervised slots alone, `chunk` of them at a time, in the backward pass too: with V = 151,936 a chunk of
    1,024 is 0.6 GB of float32 where [B, T, V] at 8 x 4,096 would be 20 GB.

    Args:
      hidden: [B, T, D] after the final norm; slots, targets: int32 [B, M]; weights: float32 [B, M], 0 = padding.
    Returns:
      (loss, weight): float32 [] each.
    """
    chosen = jnp.take_along_axis(hidden, jnp.maximum(slots, 0)[..., None], axis=1).reshape(-1, hidden.shape[-1])
    size = min(chunk, targets.size)
    pad = -targets.size % size
    chunks = lambda x: jnp.pad(x.reshape(-1), (0, pad)).reshape(-1, size)  # noqa: E731
    chosen = jnp.pad(chosen, ((0, pad), (0, 0))).reshape(-1, size, hidden.shape[-1])

    @jax.checkpoint
    def chunk_loss(total, xs):
        x, y, w = xs
        scores = logits(params.decoder, x)
        picked = jnp.take_along_axis(scores, jnp.maximum(y, 0)[:, None], axis=1)[:, 0]
        return total + jnp.sum(w * (jax.nn.logsumexp(scores, axis=-1) - picked)), None

    loss, _ = jax.lax.scan(chunk_loss, jnp.zeros_like(weights, shape=()), (chosen, chunks(targets), chunks(weights)))
    return loss, jnp.sum(weights)
