"""The training loop, top to bottom: data, parameters, one jitted and donated step, metrics, checkpoints.

B batch rows, T tokens, P patches, M supervised tokens of a row.
"""

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.checkpoints.hf import load, save
from andesvl_jax.config import AndesVLConfig
from andesvl_jax.data.pipeline import batches
from andesvl_jax.errors import RunEnded, UserError
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.packing import Batch
from andesvl_jax.inputs.tokenizer import Tokenizer
from andesvl_jax.model.andesvl import AndesVL, describe, forward, unstack_layers
from andesvl_jax.model.devices import compiled_for, target_platform
from andesvl_jax.training.bad_batch import keep_bad_batch
from andesvl_jax.training.batch_pictures import show_batch
from andesvl_jax.training.checkpoint import finish_checkpoints, open_manager, restore_latest, save_checkpoint, settle
from andesvl_jax.training.config import PARTS, Optimizer, TrainConfig
from andesvl_jax.training.hosts import data_share, from_all, is_first, on_devices, stop_signal, whole
from andesvl_jax.training.metrics import Meter, MetricsWriter, norms, start_trace, write_run_record
from andesvl_jax.training.objectives import cross_entropy
from andesvl_jax.training.optimizer import freeze, make_optimizer
from andesvl_jax.training.run_directory import check_same_run, only_run
from andesvl_jax.training.sharding import (
    check_budget,
    gather,
    make_mesh,
    optimizer_shardings,
    param_shardings,
    placement,
    sharding_table,
    sum_over_parts,
)  # fmt: skip
from andesvl_jax.weights import abstract, initialize

MAX_SKIPPED = 5  # steps in a row without a finite gradient before the run stops
SHOWN_ROWS = 8  # of the first batch, as pictures and text
PROFILED = (4, 6)  # first and last step of a profile, counted from the start: after compiling and the first batches


@struct.dataclass
class TrainState:
    step: jax.Array  # int32 []
    params: AndesVL
    optimizer: optax.OptState
    skipped: jax.Array  # int32 [], steps in a row that were not finite


def loss_fn(
    params: AndesVL, config: AndesVLConfig, batch: Batch, optimizer: Optimizer, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array]:
    """Weighted mean cross-entropy over the supervised tokens of the whole batch, and the sum of their weights."""
    params = freeze(params, optimizer)
    if mesh is not None:
        params = gather(params, config, mesh)
    with compiled_for(mesh):
        if target_platform() == "cpu":  # measured by `andesvl bench train_step`: a scanned step is slower there
            params, config = unstack_layers(params, config)
        hidden = forward(params, config, batch)
    head = AndesVL(None, None, params.decoder.replace(layers=None))
    total, weight = sum_over_parts(cross_entropy, mesh)(head, hidden, batch.target_slots, batch.targets, batch.target_weights)
    return total / jnp.maximum(weight, 1.0), weight


@functools.partial(jax.jit, static_argnames=("config", "optimizer", "mesh"), donate_argnames=("state",))
def train_step(
    state: TrainState, batch: Batch, config: AndesVLConfig, optimizer: Optimizer, steps: jax.Array | int, mesh: Mesh | None = None
):
    """One update of `steps`. A loss or gradient that is not finite leaves parameters and moments as they were.

    Args:
      mesh: where state (`state_shardings`) and batch (`batch_sharding`) lie, and the new state will; None: on one device.
    Returns:
      the new state; metrics: loss, `norms` of gradient, update and new parameters, targets, tokens, skipped (steps in a row),
      numbers [] each.
    """
    (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, config, batch, optimizer, mesh)
    if mesh is not None:
        grads = jax.lax.with_sharding_constraint(grads, param_shardings(config, mesh))
    gradient_norms = norms("gradient_norm", grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norms["gradient_norm"])
    updates, moments = make_optimizer(optimizer, describe(config), steps).update(grads, state.optimizer, state.params)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)  # noqa: E731
    new = TrainState(
        step=state.step + 1,
        params=keep(optax.apply_updates(state.params, updates), state.params),
        optimizer=keep(moments, state.optimizer),
        skipped=jnp.where(finite, 0, state.skipped + 1),
    )
    if mesh is not None:
        new = jax.lax.with_sharding_constraint(new, state_shardings(config, optimizer, mesh))
    metrics = {
        "loss": loss, **gradient_norms, **norms("update_norm", updates), **norms("parameter_norm", new.params),
        "skipped": new.skipped, "targets": jnp.sum(batch.target_slots >= 0), "tokens": jnp.sum(batch.segments >= 0),
    }  # fmt: skip
    return new, metrics


def state_shardings(config: AndesVLConfig, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """A state of `NamedSharding`: moments in parts like the parameters, counters whole."""
    description, whole, params = describe(config), NamedSharding(mesh, P()), param_shardings(config, mesh)
    transform = make_optimizer(optimizer, description, 1)
    moments = optimizer_shardings(transform, abstract(description, config.param_dtype), params, mesh)
    return TrainState(whole, params, moments, whole)


def init_state(config: TrainConfig, params: AndesVL | None = None, mesh: Mesh | None = None) -> TrainState:
    """Fresh parameters (or those given) with fresh moments; on a mesh every device makes its own part only."""
    if mesh is not None:
        at = state_shardings(config.model, config.optimizer, mesh)
        return jax.jit(functools.partial(init_state, config), out_shardings=at)(params)
    if params is None:
        params = initialize(describe(config.model), jax.random.key(config.seed), config.model.param_dtype)
    moments = make_optimizer(config.optimizer, describe(config.model), config.steps).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, moments, jnp.zeros((), jnp.int32))


def abstract_state(config: TrainConfig, mesh: Mesh | None = None) -> TrainState:
    """Shapes, types and places of `init_state`, for a restored state that needs no other beside it in memory."""
    shapes = jax.eval_shape(functools.partial(init_state, config))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    at = jax.tree.map(lambda _: one, shapes) if mesh is None else state_shardings(config.model, config.optimizer, mesh)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, at)


def train(
    config: TrainConfig, out: str | Path, resume: Literal["must", "auto"] | bool = False, command: str = "", profile: bool = False
) -> Bundle:
    """Runs `config.steps` steps and writes `out`/model (HF layout), checkpoints, metrics and the record of the run.

    Every process of a run calls it (see `training.hosts`); the first one writes. SIGTERM saves a checkpoint.
    `out`/first_batch shows what the network is given first.

    Args:
      resume: go on from the newest checkpoint; "auto": begin if there is none. profile: write a trace of a few steps to
        `out`/profile.
    Raises:
      UserError: `out` holds a run and resume is False, another process trains in it or it is another configuration's, there is
        no tokenizer, too few steps are left to profile, or the loss stays non-finite; the batch is then kept for
        `training.replay`. RunEnded: after SIGTERM.
    """
    out = Path(out)
    with only_run(out) if is_first() else contextlib.nullcontext(), stop_signal() as stop:
        manager = open_manager(out / "checkpoints", config.keep)
        try:
            return _train(config, out, manager, resume, command, profile, stop)
        except UserError:
            settle(manager)
            raise


def _train(config: TrainConfig, out: Path, manager, resume, command: str, profile: bool, stop: Callable[[int], bool]) -> Bundle:
    mesh = None if config.mesh is None else make_mesh(config.mesh)
    share, shares = data_share(mesh)
    if mesh is not None:
        check_budget(config.budget, mesh)
        if is_first():
            print(sharding_table(config.model, mesh))
    if manager.latest_step() is not None and not resume:
        raise UserError(f"{out}: holds a run up to step {manager.latest_step()}; give --resume or another --out.")
    resume = resume is True or resume == "must" or (resume == "auto" and manager.latest_step() is not None)
    if resume:
        check_same_run(out, config)

    # ---- model and data
    start = (
        None
        if config.init_from is None
        else load(config.init_from, config.model.param_dtype, sharding=placement(config.model, mesh))
    )
    tokenizer = start.tokenizer if config.tokenizer is None and start else Tokenizer.load(config.tokenizer or out)
    if tokenizer is None:
        raise UserError(f"{config.tokenizer or out}: has no tokenizer.json, expected one beside the run or in init_from.")
    model = config.model.replace(image_token_id=tokenizer.image_token_id)
    processor = ImageProcessor.from_hf({"min_tokens": config.min_tokens}, model.vision, max_size=config.max_size)
    features, average = model.vision.patch_features, config.loss_average
    made = batches(config.data, tokenizer, processor, config.budget, features, average, share, shares, config.workers)
    data = on_devices(made, mesh)
    if resume:
        state = restore_latest(manager, abstract_state(config, mesh), data)
    else:
        state = init_state(config, None if start is None else start.params, mesh)
    if is_first():
        write_run_record(out, config, command)

    # ---- steps
    first, began = int(state.step), time.perf_counter()
    if profile and config.steps < first + PROFILED[1]:
        raise UserError(f"--profile: {config.steps - first} steps are left, expected at least {PROFILED[1]}.")
    trained = [part for part in PARTS if getattr(config.optimizer, part)]
    meter = Meter(model, trained, jax.devices()[:1] if mesh is None else mesh.local_devices, shares)
    before = None  # metrics of the step before
    quiet = None if is_first() else True
    with MetricsWriter(out, is_first()) as writer, tqdm(total=config.steps, initial=first, unit="step", disable=quiet) as bar:
        for step in range(first + 1, config.steps + 1):
            batch, placed = meter.draw(data)
            if step == 1 and is_first():
                show_batch(batch, out / "first_batch", tokenizer, processor, SHOWN_ROWS)
            if profile and step == first + PROFILED[0]:
                start_trace(out / "profile", after=state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(state, placed, model, config.optimizer, config.steps, mesh)
            if profile and step == first + PROFILED[1]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            meter.ran(batch, metrics["loss"])
            if step % config.log_every == 0 or step in (first + 1, config.steps):
                values = {name: float(value) for name, value in metrics.items()}
                values |= meter.line() | {"seconds": time.perf_counter() - began}
                writer.write(step, values)
                bar.set_postfix(loss=f"{values['loss']:.3f}", tokens_per_s=f"{values['tokens_per_s']:.0f}")
                if values["skipped"] >= MAX_SKIPPED:
                    bundle = Bundle(model, whole(state.params), tokenizer, processor)
                    kept = keep_bad_batch(out, batch, bundle) if is_first() else "the first process keeps its rows"
                    newest = manager.latest_step()
                    raise UserError(
                        f"step {step}: the loss or gradient was not finite in {int(values['skipped'])} steps in a row, expected "
                        f"finite values; {kept}; mend the data or lower the optimizer's rates, then "
                        f"{'start anew' if newest is None else f'--resume from step {newest}'}."
                    )
            bar.update()
            stopping = stop(step) and step < config.steps
            if step % config.checkpoint_every == 0 or step == config.steps or stopping:
                save_checkpoint(manager, step, state, data)
            if stopping:
                finish_checkpoints(manager)
                raise RunEnded(f"SIGTERM: saved step {step} in {out}; go on with --resume.", RunEnded.STOPPED)
            jax.block_until_ready(before)  # the host is never further ahead than that, so that a signal is soon answered
            before = metrics
    finish_checkpoints(manager)

    params = whole(state.params)
    bundle = Bundle(model, params, tokenizer, processor, {"do_sample": False, "eos_token_id": [tokenizer.im_end_id]})
    if is_first():
        save(bundle, out / "model")
    from_all(None)  # nobody leaves before the model is written
    return bundle
