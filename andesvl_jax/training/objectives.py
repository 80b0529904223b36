"""What a training step minimizes, one frozen dataclass each; logits exist for supervised tokens alone, a chunk at a time.

An objective is called as objective(params, config, batch, rng, reference, mesh) and returns (total, weight, metrics): the loss
is total / weight over all micro-batches of a step, and so is each entry of metrics, a sum by name.
B batch rows, T tokens, M supervised tokens of a row, n supervised tokens of a chunk, D width, V vocabulary.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from andesvl_jax.config import AndesVLConfig
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.packing import Batch
from andesvl_jax.model.andesvl import AndesVL, forward
from andesvl_jax.model.context import take_tokens
from andesvl_jax.training.sharding import sum_over_parts
from andesvl_jax.weights import Leaf, unembed

CHUNK = 1024  # tokens: with V = 151,936 their logits are 0.6 GB of float32, where [B, T, V] at 8 x 4,096 would be 20 GB
Sums = tuple[jax.Array, jax.Array, dict[str, jax.Array]]


@dataclass(frozen=True)
class CrossEntropy:
    """Next-token cross-entropy of the supervised tokens."""

    teacher: None = None

    def __call__(
        self, params: AndesVL, config: AndesVLConfig, batch: Batch, rng=None, reference=None, mesh: Mesh | None = None
    ) -> Sums:
        hidden = forward(params, config, batch)
        total, weight = sum_over_parts(cross_entropy, mesh)(_head(params), hidden, *_supervised(batch))
        return total, weight, {}


@dataclass(frozen=True)
class Distillation:
    """(1 - mix) x cross-entropy + mix x temperature^2 x KL(teacher || student), per supervised token (Hinton, arXiv 1503.02531).

    Attributes:
      teacher: checkpoint directory or a name that ships; its vocabulary must be the student's.
      temperature: divides the logits of both inside the KL.
    """

    teacher: str
    temperature: float = 1.0
    mix: float = 1.0

    def __post_init__(self):
        if not self.temperature > 0 or not 0 <= self.mix <= 1:
            raise UserError(
                f"training field objective: found temperature {self.temperature} and mix {self.mix}, expected a temperature "
                "above 0 and a mix from 0 to 1."
            )

    def __call__(
        self, params: AndesVL, config: AndesVLConfig, batch: Batch, rng=None, reference=None, mesh: Mesh | None = None
    ) -> Sums:
        teacher, teacher_config = reference
        taught = jax.lax.stop_gradient(forward(teacher, teacher_config, batch))
        hidden = forward(params, config, batch)
        heads = _head(params), jax.lax.stop_gradient(_head(teacher))
        sums = functools.partial(distillation, temperature=self.temperature, mix=self.mix)
        total, weight, metrics = sum_over_parts(sums, mesh)(heads, hidden, taught, *_supervised(batch))
        return total, weight, metrics


Objective = CrossEntropy | Distillation


def cross_entropy(
    params: AndesVL, hidden: jax.Array, slots: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int = CHUNK
):
    """Weighted sum of next-token cross-entropy over supervised tokens, and the sum of their weights.

    Args:
      hidden: [B, T, D] after the final norm; slots, targets: int32 [B, M]; weights: float32 [B, M], 0 = padding.
    Returns:
      (loss, weight): float32 [] each.
    """
    chosen, (targets, chunk_weights) = _chunks(hidden, slots, chunk, targets, weights)
    loss, _ = _sum_of_chunks(_cross_entropy, _table(params), chosen, chunk_weights, (), targets)
    return loss, jnp.sum(weights)


def distillation(
    heads: tuple[AndesVL, AndesVL], hidden, taught, slots, targets, weights, temperature: float, mix: float, chunk: int = CHUNK
):
    """Weighted sum of the distillation loss over supervised tokens, the sum of their weights, and the sums of its two terms.

    Args:
      heads: of student and teacher; hidden, taught: [B, T, D] of each after its final norm; the rest as `cross_entropy`.
    """
    student, teacher = heads
    chosen, (targets, chunk_weights) = _chunks(hidden, slots, chunk, targets, weights)
    chosen_by_teacher, _ = _chunks(taught, slots, chunk)
    fn = functools.partial(_distillation, temperature=temperature, mix=mix)
    loss, metrics = _sum_of_chunks(fn, _table(student), chosen, chunk_weights, _table(teacher), (targets, chosen_by_teacher))
    return loss, jnp.sum(weights), metrics


def token_log_probs(params: AndesVL, hidden: jax.Array, slots: jax.Array, targets: jax.Array, chunk: int = CHUNK) -> jax.Array:
    """Log-probability of each target, float32 [B, M]; the backward pass makes the logits of a chunk anew.

    Args:
      hidden: [B, T, D] after the final norm; slots, targets: int32 [B, M]; the value at a padding slot (-1) is of no use.
    """
    chosen, (of_chunk,) = _chunks(hidden, slots, chunk, targets)
    table = _table(params)
    values = jax.lax.map(jax.checkpoint(lambda x: _log_probs(unembed(table, x[0]), x[1])), (chosen, of_chunk))
    return values.reshape(-1)[: targets.size].reshape(targets.shape)


def _head(params: AndesVL) -> AndesVL:
    return AndesVL(None, None, params.decoder.replace(layers=None))


def _table(params: AndesVL) -> Leaf:
    return params.decoder.embedding if params.decoder.head is None else params.decoder.head


def _supervised(batch: Batch) -> tuple:
    return batch.target_slots, batch.targets, batch.target_weights


def _chunks(hidden: jax.Array, slots: jax.Array, chunk: int, *rest: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """The supervised tokens' hidden states [chunks, n, D], and arrays [B, M] as [chunks, n], padded with zeros."""
    chosen = take_tokens(hidden, slots).reshape(-1, hidden.shape[-1])
    size = min(chunk, len(chosen))
    pad = -len(chosen) % size
    cut = [jnp.pad(x.reshape(-1), (0, pad)).reshape(-1, size) for x in rest]
    return jnp.pad(chosen, ((0, pad), (0, 0))).reshape(-1, size, hidden.shape[-1]), cut


def _log_probs(scores: jax.Array, targets: jax.Array) -> jax.Array:
    # compared, not gathered: the gradient of a gather is a scatter into one more array of logits
    picked = jnp.sum(scores, axis=-1, where=targets[:, None] == jnp.arange(scores.shape[-1]))
    return picked - jax.nn.logsumexp(scores, axis=-1)


def _cross_entropy(table: Leaf, x: jax.Array, weights: jax.Array, fixed: tuple, targets: jax.Array):
    return -jnp.sum(weights * _log_probs(unembed(table, x), targets)), {}


def _distillation(table: Leaf, x: jax.Array, weights: jax.Array, teacher: Leaf, given, temperature: float, mix: float):
    targets, taught = given
    scores = unembed(table, x)
    student = jax.nn.log_softmax(scores / temperature, axis=-1)
    target = jax.nn.log_softmax(unembed(teacher, taught) / temperature, axis=-1)
    divergence = jnp.sum(weights * jnp.sum(jnp.exp(target) * (target - student), axis=-1))
    entropy = -jnp.sum(weights * _log_probs(scores, targets))
    return (1 - mix) * entropy + mix * temperature**2 * divergence, {"cross_entropy": entropy, "kl": divergence}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_chunks(fn: Callable, table: Leaf, chosen: jax.Array, weights: jax.Array, fixed: Any, given: Any):
    """(sum, sums by name) of fn(table, x [n, D], weights [n], fixed, given of the chunk) over chunks.

    Under differentiation the gradient of a chunk is made while its logits are there; `fixed` and `given` have none, and neither
    have the sums by name.
    """
    step = functools.partial(_add_chunk, fn, table, fixed)
    zeros = jax.eval_shape(fn, table, chosen[0], weights[0], fixed, jax.tree.map(lambda x: x[0], given))
    zeros = jax.tree.map(lambda x: jnp.zeros_like(weights, shape=x.shape), zeros)
    return jax.lax.scan(step, zeros, (chosen, weights, given))[0]


def _add_chunk(fn: Callable, table: Leaf, fixed: Any, sums, xs):
    x, weights, given = xs
    return jax.tree.map(jnp.add, sums, fn(table, x, weights, fixed, given)), None


def _sum_with_gradients(fn, table, chosen, weights, fixed, given):
    def learned(leaves):
        return [x for x, w in zip(leaves, jax.tree.leaves(table), strict=True) if _is_learned(w)]

    def step(carry, xs):
        sums, table_sums = carry
        x, w, of_chunk = xs
        loss, backward, metrics = jax.vjp(lambda table, x, w: fn(table, x, w, fixed, of_chunk), table, x, w, has_aux=True)
        d_table, d_x, d_w = backward(jnp.ones_like(loss))
        table_sums = [a + b for a, b in zip(table_sums, learned(jax.tree.leaves(d_table)), strict=True)]
        return (jax.tree.map(jnp.add, sums, (loss, metrics)), table_sums), (d_x, d_w)

    first = jax.eval_shape(fn, table, chosen[0], weights[0], fixed, jax.tree.map(lambda x: x[0], given))
    zeros = jax.tree.map(lambda x: jnp.zeros_like(weights, shape=x.shape), first)
    table_zeros = [jnp.zeros_like(w) for w in learned(jax.tree.leaves(table))]
    (sums, table_sums), (d_chosen, d_weights) = jax.lax.scan(step, (zeros, table_zeros), (chosen, weights, given))
    rest = iter(table_sums)
    return sums, (jax.tree.map(lambda w: next(rest) if _is_learned(w) else None, table), d_chosen, d_weights)


def _is_learned(w: jax.Array) -> bool:
    return jnp.issubdtype(w.dtype, jnp.inexact)


def _scaled(fn, gradients, cotangents):
    g, _ = cotangents
    d_table, d_chosen, d_weights = jax.tree.map(lambda x: g.astype(x.dtype) * x, gradients)
    return d_table, d_chosen, d_weights, None, None


_sum_of_chunks.defvjp(_sum_with_gradients, _scaled)
