"""The training loop, top to bottom: data, parameters, one jitted and donated step, metrics, checkpoints."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.checkpoints.hf import load, save
from andesvl_jax.checkpoints.peft import save_adapter
from andesvl_jax.config import AndesVLConfig
from andesvl_jax.data.pipeline import batches
from andesvl_jax.errors import RunEnded, UserError
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.tokenizer import Tokenizer
from andesvl_jax.training.bad_batch import keep_bad_batch
from andesvl_jax.training.batch_pictures import show_batch
from andesvl_jax.training.checkpoint import finish_checkpoints, open_manager, restore_latest, save_checkpoint, settle
from andesvl_jax.training.config import PARTS, TrainConfig
from andesvl_jax.training.hosts import data_share, from_all, is_first, on_devices, stop_signal, whole
from andesvl_jax.training.metrics import Meter, MetricsWriter, start_trace, write_run_record
from andesvl_jax.training.run_directory import check_same_run, only_run
from andesvl_jax.training.sharding import check_budget, make_mesh, param_shardings, placement, sharding_table
from andesvl_jax.training.step import abstract_state, adapted, frozen_part, init_state, train_step
from andesvl_jax.weights import Recipe

MAX_SKIPPED = 5  # steps in a row without a finite gradient before the run stops
SHOWN_ROWS = 8  # of the first batch, as pictures and text
PROFILED = (4, 6)  # first and last step of a profile, counted from the start: after compiling and the first batches


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
    recipe = _recipe(config, start)
    params = None if start is None else adapted(config, start.params, recipe, mesh)
    processor = ImageProcessor.from_hf({"min_tokens": config.min_tokens}, model.vision, max_size=config.max_size)
    features, average = model.vision.patch_features, config.loss_average
    made = batches(config.data, tokenizer, processor, config.budget, features, average, share, shares, config.workers)
    data = on_devices(made, mesh)
    if resume:
        state = restore_latest(manager, abstract_state(config, mesh, recipe), frozen_part(config, params, mesh, recipe), data)
    else:
        state = init_state(config, params, mesh, recipe)
    reference, reference_config = _reference(config, model, processor, mesh)
    rng = jax.random.key(config.seed)
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
            drawn = [meter.draw(data) for _ in range(config.accumulate)]
            batch, placed = drawn[0][0], [placed for _, placed in drawn]
            if step == 1 and is_first():
                show_batch(batch, out / "first_batch", tokenizer, processor, SHOWN_ROWS)
            if profile and step == first + PROFILED[0]:
                start_trace(out / "profile", after=state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(
                    state, placed, model, config.optimizer, config.steps, mesh, config.objective, recipe, reference,
                    reference_config, rng,
                )  # fmt: skip
            if profile and step == first + PROFILED[1]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            meter.ran([batch for batch, _ in drawn], metrics["loss"])
            if step % config.log_every == 0 or step in (first + 1, config.steps):
                values = {name: float(value) for name, value in metrics.items()}
                values |= meter.line() | {"seconds": time.perf_counter() - began}
                writer.write(step, values)
                bar.set_postfix(loss=f"{values['loss']:.3f}", tokens_per_s=f"{values['tokens_per_s']:.0f}")
                if values["skipped"] >= MAX_SKIPPED:
                    kept = _kept(out, batch, Bundle(model, whole(state.params), tokenizer, processor), recipe)
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

    settings = {"do_sample": False, "eos_token_id": [tokenizer.im_end_id]}
    bundle = Bundle(model, whole(state.params), tokenizer, processor, settings, None if start is None else start.recipe)
    if is_first():
        if config.adapters.rules:
            save_adapter(bundle.params, model, out / "adapter", base_name=str(config.init_from))
        else:
            save(bundle, out / "model")
    from_all(None)  # nobody leaves before the model is written
    return bundle


def _recipe(config: TrainConfig, start: Bundle | None) -> Recipe | None:
    """Representation of the run's parameters: that of the base, and the new adapters.

    Raises:
      UserError: packed weights without adapters, which nothing could train.
    """
    base = None if start is None else start.recipe
    if base is not None and not config.adapters.rules:
        raise UserError(f"{config.init_from}: its weights are packed, which cannot be trained; set adapters.decoder to a rank.")
    rules = (() if base is None else base.rules) + config.adapters.rules
    return Recipe(rules) if rules else None


def _reference(config: TrainConfig, model: AndesVLConfig, processor: ImageProcessor, mesh: Mesh | None) -> tuple[Any, Any]:
    """Parameters and config of the objective's teacher, or (None, None).

    Raises:
      UserError: a teacher with another vocabulary, or one that sees other patches.
    """
    if config.objective.teacher is None:
        return None, None
    teacher = load(config.objective.teacher, config.model.param_dtype)
    name = config.objective.teacher
    if teacher.config.text.vocab_size != model.text.vocab_size:
        raise UserError(
            f"training field objective.teacher: {name} has {teacher.config.text.vocab_size} tokens, expected "
            f"{model.text.vocab_size}, as the model has."
        )
    found, expected = ((p.patch_size, p.mean, p.std) for p in (teacher.image_processor, processor))
    if found != expected:
        raise UserError(
            f"training field objective.teacher: {name} takes patches {found}, expected {expected} (side, mean, deviation)."
        )
    params = teacher.params
    if mesh is not None:
        params = jax.device_put(params, param_shardings(teacher.config, mesh))
    return params, teacher.config.replace(image_token_id=model.image_token_id, dtype=model.dtype)


def _kept(out: Path, batch, bundle: Bundle, recipe: Recipe | None) -> str:
    if not is_first():
        return "the first process keeps its rows"
    return keep_bad_batch(out, batch, bundle) if recipe is None else "its batch is not kept, since the model has adapters"
