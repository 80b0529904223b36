"""Losses. B batch rows, T tokens, M supervised tokens of a row, D width, V vocabulary."""

import jax
import jax.numpy as jnp

from andesvl_jax.model.andesvl import AndesVL
from andesvl_jax.model.decoder import logits


def cross_entropy(params: AndesVL, hidden: jax.Array, slots: jax.Array, targets: jax.Array, chunk: int = 1024):
    """Sum of next-token cross-entropy over supervised tokens, and their number.

    Logits exist for supervised slots alone, `chunk` of them at a time, in the backward pass too: with V = 151,936 a chunk of
    1,024 is 0.6 GB of float32 where [B, T, V] at 8 x 4,096 would be 20 GB.

    Args:
      hidden: [B, T, D] after the final norm; slots, targets: int32 [B, M], -1 = padding.
    Returns:
      (loss, count): float32 [] each.
    """
    chosen = jnp.take_along_axis(hidden, jnp.maximum(slots, 0)[..., None], axis=1).reshape(-1, hidden.shape[-1])
    targets = jnp.where(slots >= 0, targets, -1).reshape(-1)
    size = min(chunk, targets.shape[0])
    pad = -targets.shape[0] % size
    chosen = jnp.pad(chosen, ((0, pad), (0, 0))).reshape(-1, size, hidden.shape[-1])
    targets = jnp.pad(targets, (0, pad), constant_values=-1).reshape(-1, size)

    @jax.checkpoint
    def chunk_loss(total, xs):
        x, y = xs
        scores = logits(params.decoder, x)
        picked = jnp.take_along_axis(scores, jnp.maximum(y, 0)[:, None], axis=1)[:, 0]
        return total + jnp.sum(jnp.where(y >= 0, jax.nn.logsumexp(scores, axis=-1) - picked, 0.0)), None

    loss, _ = jax.lax.scan(chunk_loss, jnp.zeros(()), (chosen, targets))
    return loss, jnp.sum(targets >= 0).astype(jnp.float32)
