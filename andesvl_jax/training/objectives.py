"""Losses. B batch rows, T tokens, M supervised tokens of a row, D width, V vocabulary."""

import jax
import jax.numpy as jnp

from andesvl_jax.model.andesvl import AndesVL
from andesvl_jax.model.decoder import logits


def cross_entropy(
    params: AndesVL, hidden: jax.Array, slots: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int = 1024,
    shards: int = 1,
):  # fmt: skip
    """Weighted sum of next-token cross-entropy over supervised tokens, and the sum of their weights.

    Logits exist for supervised slots alone, `chunk` of them at a time, in the backward pass too: with V = 151,936 a chunk of
    1,024 is 0.6 GB of float32 where [B, T, V] at 8 x 4,096 would be 20 GB.

    Args:
      hidden: [B, T, D] after the final norm; slots, targets: int32 [B, M]; weights: float32 [B, M], 0 = padding.
      shards: parts of B that lie on different devices; every device then walks through its own slots, `chunk` at a time.
    Returns:
      (loss, weight): float32 [] each.
    """
    chosen = jnp.take_along_axis(hidden, jnp.maximum(slots, 0)[..., None], axis=1)
    size = min(chunk, targets.size // shards)
    pad = -(targets.size // shards) % size

    def chunks(x: jax.Array) -> jax.Array:
        """[B, M, ...] -> [chunks, shards * size, ...]."""
        x = jnp.pad(x.reshape(shards, -1, *x.shape[2:]), [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(shards, -1, size, *x.shape[2:]), 1, 0)
        return x.reshape(-1, shards * size, *x.shape[3:])

    @jax.checkpoint
    def chunk_loss(total, xs):
        x, y, w = xs
        scores = logits(params.decoder, x)
        picked = jnp.take_along_axis(scores, jnp.maximum(y, 0)[:, None], axis=1)[:, 0]
        return total + jnp.sum(w * (jax.nn.logsumexp(scores, axis=-1) - picked)), None

    loss, _ = jax.lax.scan(chunk_loss, jnp.zeros(()), (chunks(chosen), chunks(targets), chunks(weights)))
    return loss, jnp.sum(weights)
