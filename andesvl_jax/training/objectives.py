"""Losses. B batch rows, T tokens, M supervised tokens of a row, n supervised tokens of a chunk, D width, V vocabulary."""

import jax
import jax.numpy as jnp

from andesvl_jax.model.andesvl import AndesVL
from andesvl_jax.model.context import take_tokens
from andesvl_jax.weights import Leaf, unembed


def cross_entropy(
    params: AndesVL, hidden: jax.Array, slots: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int = 1024
):
    """Weighted sum of next-token cross-entropy over supervised tokens, and the sum of their weights.

    Logits exist for supervised slots alone, `chunk` of them at a time, and once: under differentiation the gradient of a chunk
    is made while its logits are there. With V = 151,936 a chunk of 1,024 is 0.6 GB of float32 where [B, T, V] at 8 x 4,096
    would be 20 GB.

    Args:
      hidden: [B, T, D] after the final norm; slots, targets: int32 [B, M]; weights: float32 [B, M], 0 = padding.
    Returns:
      (loss, weight): float32 [] each.
    """
    chosen = take_tokens(hidden, slots).reshape(-1, hidden.shape[-1])
    size = min(chunk, targets.size)
    pad = -targets.size % size
    chunks = lambda x: jnp.pad(x.reshape(-1), (0, pad)).reshape(-1, size)  # noqa: E731
    chosen = jnp.pad(chosen, ((0, pad), (0, 0))).reshape(-1, size, hidden.shape[-1])
    table = params.decoder.embedding if params.decoder.head is None else params.decoder.head
    loss = _loss(table, chosen, chunks(targets), chunks(weights))
    return loss, jnp.sum(weights)


def _chunk_loss(table: Leaf, x: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    scores = unembed(table, x)
    # compared, not gathered: the gradient of a gather is a scatter into one more array of logits
    picked = jnp.sum(scores, axis=-1, where=targets[:, None] == jnp.arange(scores.shape[-1]))
    return jnp.sum(weights * (jax.nn.logsumexp(scores, axis=-1) - picked))


@jax.custom_vjp
def _loss(table: Leaf, chosen: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum over chunks: x [chunks, n, D]; targets, weights [chunks, n]."""
    step = lambda total, xs: (total + _chunk_loss(table, *xs), None)  # noqa: E731
    return jax.lax.scan(step, jnp.zeros_like(weights, shape=()), (chosen, targets, weights))[0]


def _loss_with_gradients(table, chosen, targets, weights):
    of_table = lambda leaves: [x for x, w in zip(leaves, jax.tree.leaves(table), strict=True) if _is_learned(w)]  # noqa: E731

    def step(carry, xs):
        total, sums = carry
        x, y, w = xs
        loss, backward = jax.vjp(lambda table, x, w: _chunk_loss(table, x, y, w), table, x, w)
        d_table, d_x, d_w = backward(jnp.ones_like(loss))
        sums = [a + b for a, b in zip(sums, of_table(jax.tree.leaves(d_table)), strict=True)]
        return (total + loss, sums), (d_x, d_w)

    zeros = [jnp.zeros_like(w) for w in of_table(jax.tree.leaves(table))]
    (total, sums), (d_chosen, d_weights) = jax.lax.scan(
        step, (jnp.zeros_like(weights, shape=()), zeros), (chosen, targets, weights)
    )
    rest = iter(sums)
    return total, (jax.tree.map(lambda w: next(rest) if _is_learned(w) else None, table), d_chosen, d_weights)


def _is_learned(w: jax.Array) -> bool:
    return jnp.issubdtype(w.dtype, jnp.inexact)


def _scaled(gradients, g):
    d_table, d_chosen, d_weights = jax.tree.map(lambda x: g.astype(x.dtype) * x, gradients)
    return d_table, d_chosen, None, d_weights


_loss.defvjp(_loss_with_gradients, _scaled)
