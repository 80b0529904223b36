"""One training step as a pure function: gradients of the trained part of the parameters, clipping, AdamW, metrics.

B batch rows, T tokens, P patches, M supervised tokens of a row.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from andesvl_jax.config import AndesVLConfig
from andesvl_jax.inputs.packing import Batch
from andesvl_jax.model.andesvl import AndesVL, describe, has_packed, unstack_layers
from andesvl_jax.model.devices import compiled_for, target_platform
from andesvl_jax.training.config import PARTS, Optimizer, TrainConfig
from andesvl_jax.training.metrics import norms
from andesvl_jax.training.objectives import CrossEntropy, Objective
from andesvl_jax.training.optimizer import make_optimizer
from andesvl_jax.training.sharding import gather, optimizer_shardings, param_shardings
from andesvl_jax.weights import Adapt, Recipe, abstract, initialize, represent
from andesvl_jax.weights.partition import Trainable, combine, partition, select


@struct.dataclass
class TrainState:
    """Where a run stands.

    Attributes:
      step: int32 [].
      trained, frozen: the parameters in two, None where an array is in the other.
      optimizer: moments of the trained part.
      skipped: int32 [], steps in a row that were not finite.
    """

    step: jax.Array
    trained: AndesVL
    frozen: AndesVL
    optimizer: optax.OptState
    skipped: jax.Array

    @property
    def params(self) -> AndesVL:
        return combine(self.trained, self.frozen)


def trainable(optimizer: Optimizer, recipe: Recipe | None = None) -> Trainable:
    """Which arrays a run trains: those of parts with a rate; where there are adapters, only the two halves of each."""
    parts = tuple(f"{part}." for part in PARTS if getattr(optimizer, part) > 0)
    adapted = recipe is not None and any(isinstance(rule.form, Adapt) for rule in recipe.rules)

    def chosen(path: str, array) -> bool:
        return path.startswith(parts) and (not adapted or path.endswith((".a", ".b")))

    return chosen


def loss_sums(
    params: AndesVL,
    config: AndesVLConfig,
    batch: Batch,
    rng: jax.Array | None = None,
    reference: AndesVL | None = None,
    objective: Objective = CrossEntropy(),
    recipe: Recipe | None = None,
    mesh: Mesh | None = None,
    reference_config: AndesVLConfig | None = None,
):
    """(total, weight, metrics) of an objective for parameters as they are stored."""
    if mesh is not None:
        params = gather(params, config, mesh, recipe)
        reference = None if reference is None else gather(reference, reference_config, mesh)
    with compiled_for(mesh):
        params, config = _for_training(params, config)
        if reference is not None:
            reference = _for_training(reference, reference_config)
        return objective(params, config, batch, rng, reference, mesh)


def _for_training(params: AndesVL, config: AndesVLConfig) -> tuple[AndesVL, AndesVLConfig]:
    """Layers unrolled on CPU, where a scanned step is slower (`andesvl bench train_step`), unless some are packed."""
    if target_platform() != "cpu" or has_packed(params):
        return params, config
    return unstack_layers(params, config)


@functools.partial(
    jax.jit,
    static_argnames=("config", "optimizer", "mesh", "objective", "recipe", "reference_config"),
    donate_argnames=("state",),
)
def train_step(
    state: TrainState,
    batch: Batch | Sequence[Batch],
    config: AndesVLConfig,
    optimizer: Optimizer,
    steps: jax.Array | int,
    mesh: Mesh | None = None,
    objective: Objective = CrossEntropy(),
    recipe: Recipe | None = None,
    reference: AndesVL | None = None,
    reference_config: AndesVLConfig | None = None,
    rng: jax.Array | None = None,
):
    """One update of `steps`. A loss or gradient that is not finite leaves parameters and moments as they were.

    Args:
      batch: one, or micro-batches of one shape whose gradients are summed over the weight of all of them.
      mesh: where state (`state_shardings`) and batch (`batch_sharding`) lie, and the new state will; None: on one device.
      recipe: representation of the parameters; None: dense.
      reference, reference_config: what the objective compares with, such as a teacher; it has no gradient.
    Returns:
      the new state; metrics: loss, the objective's own, `norms` of gradient, update and new trained parameters, targets, tokens,
      skipped (steps in a row), numbers [] each.
    """
    rng = None if rng is None else jax.random.fold_in(rng, state.step)

    def sums(trained: AndesVL, batch: Batch):
        params = combine(trained, state.frozen)
        total, weight, metrics = loss_sums(params, config, batch, rng, reference, objective, recipe, mesh, reference_config)
        return total, (weight, metrics)

    micro = [batch] if isinstance(batch, Batch) else list(batch)
    gradient = _gradient if len(micro) == 1 else _accumulated_gradient
    (loss, metrics), grads = gradient(sums, state.trained, micro)
    if mesh is not None:
        grads = jax.lax.with_sharding_constraint(grads, select(param_shardings(config, mesh, recipe=recipe), state.trained))
    gradient_norms = norms("gradient_norm", grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norms["gradient_norm"])
    transform = make_optimizer(optimizer, select(describe(config, recipe), state.trained), steps)
    updates, moments = transform.update(grads, state.optimizer, state.trained)

    def keep(new, old):
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    new = state.replace(
        step=state.step + 1,
        trained=keep(optax.apply_updates(state.trained, updates), state.trained),
        optimizer=keep(moments, state.optimizer),
        skipped=jnp.where(finite, 0, state.skipped + 1),
    )
    if mesh is not None:
        new = jax.lax.with_sharding_constraint(new, state_shardings(config, optimizer, mesh, recipe))
    return new, {
        "loss": loss,
        **metrics,
        **gradient_norms,
        **norms("update_norm", updates),
        **norms("parameter_norm", _floats(new.params)),
        "skipped": new.skipped,
        "targets": sum(jnp.sum(b.target_slots >= 0) for b in micro),
        "tokens": sum(jnp.sum(b.segments >= 0) for b in micro),
    }


def _floats(tree: AndesVL) -> AndesVL:
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) else None, tree)


def _gradient(sums, trained: AndesVL, micro: list[Batch]):
    def loss(trained):
        total, (weight, metrics) = sums(trained, micro[0])
        weight = jnp.maximum(weight, 1.0)
        return total / weight, {name: x / weight for name, x in metrics.items()}

    return jax.value_and_grad(loss, has_aux=True)(trained)


def _accumulated_gradient(sums, trained: AndesVL, micro: list[Batch]):
    """Over all micro-batches and the weight of all of them, in the memory of one of them and one gradient more."""
    one = jax.value_and_grad(sums, has_aux=True)

    def step(carry, batch):
        return jax.tree.map(jnp.add, carry, one(trained, batch)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, trained, micro[0]))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *micro)
    ((total, (weight, metrics)), grads), _ = jax.lax.scan(step, zeros, stacked)
    weight = jnp.maximum(weight, 1.0)
    loss, grads = jax.tree.map(lambda x: x / weight.astype(x.dtype), ((total, metrics), grads))
    return loss, grads


def state_shardings(config: AndesVLConfig, optimizer: Optimizer, mesh: Mesh, recipe: Recipe | None = None) -> TrainState:
    """A state of `NamedSharding`: moments in parts like the parameters, counters whole."""
    whole, params = NamedSharding(mesh, P()), param_shardings(config, mesh, recipe=recipe)
    description, _ = partition(describe(config, recipe), trainable(optimizer, recipe))
    trained = select(params, description)
    _, frozen = _split_like(params, description)
    transform = make_optimizer(optimizer, description, 1)
    moments = optimizer_shardings(transform, abstract(description, config.param_dtype), trained, mesh)
    return TrainState(whole, trained, frozen, moments, whole)


def _split_like(tree, description):
    trained = select(tree, description)
    frozen = jax.tree.map(lambda x, kept: None if kept is not None else x, tree, trained, is_leaf=lambda x: x is None)
    return trained, frozen


def init_state(
    config: TrainConfig, params: AndesVL | None = None, mesh: Mesh | None = None, recipe: Recipe | None = None
) -> TrainState:
    """Fresh parameters (or those given) with fresh moments; on a mesh every device makes its own part only.

    Args:
      recipe: representation of the parameters; new adapters come from `config.seed`, packed weights have to be given.
    """
    if mesh is not None:
        at = state_shardings(config.model, config.optimizer, mesh, recipe)
        return jax.jit(functools.partial(init_state, config, recipe=recipe), out_shardings=at)(params)
    if params is None:
        params = initialize(describe(config.model, recipe), jax.random.key(config.seed), config.model.param_dtype)
    trained, frozen = partition(params, trainable(config.optimizer, recipe))
    description = select(describe(config.model, recipe), trained)
    moments = make_optimizer(config.optimizer, description, config.steps).init(trained)
    return TrainState(jnp.zeros((), jnp.int32), trained, frozen, moments, jnp.zeros((), jnp.int32))


def abstract_state(config: TrainConfig, mesh: Mesh | None = None, recipe: Recipe | None = None) -> TrainState:
    """Shapes, types and places of `init_state`, for a restored state that needs no other beside it in memory."""
    shapes = jax.eval_shape(functools.partial(init_state, config, recipe=recipe))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    at = jax.tree.map(lambda _: one, shapes)
    if mesh is not None:
        at = state_shardings(config.model, config.optimizer, mesh, recipe)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, at)


def frozen_part(config: TrainConfig, params: AndesVL | None, mesh: Mesh | None, recipe: Recipe | None) -> AndesVL:
    """What `init_state` would freeze of these parameters, without moments."""

    def frozen(params):
        return init_state(config, params, None, recipe).frozen

    if mesh is None:
        return frozen(params)
    at = state_shardings(config.model, config.optimizer, mesh, recipe).frozen
    return jax.jit(frozen, out_shardings=at)(params)


def adapted(config: TrainConfig, params: AndesVL, recipe: Recipe | None, mesh: Mesh | None) -> AndesVL:
    """The base with the run's new adapters, which change nothing yet."""
    if not config.adapters.rules:
        return params

    def adapt(params):
        return represent(params, config.adapters.rules, jax.random.key(config.seed))

    if mesh is None:
        return adapt(params)
    return jax.jit(adapt, out_shardings=param_shardings(config.model, mesh, recipe=recipe))(params)
