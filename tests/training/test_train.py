"""The loop as a whole: exact resume, freezing, the guard against non-finite steps, and what a run leaves behind."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import andesvl_jax as avl
from andesvl_jax.data.pipeline import batches
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.tokenizer import Tokenizer
from andesvl_jax.model.andesvl import describe
from andesvl_jax.training import loop as loop_lib
from andesvl_jax.training.checkpoint import open_manager, restore_latest
from andesvl_jax.training.loop import train
from andesvl_jax.training.metrics import read_metrics
from andesvl_jax.training.optimizer import make_optimizer, rate
from andesvl_jax.training.step import init_state, loss_sums, train_step


def data_of(config):
    processor = ImageProcessor.from_hf({"min_tokens": config.min_tokens}, config.model.vision, max_size=config.max_size)
    tokenizer = Tokenizer.load(config.tokenizer)
    return iter(batches(config.data, tokenizer, processor, config.budget, config.model.vision.patch_features))


def restored(config, out):
    """Final state of a run and the batch that would come next."""
    data = data_of(config)
    manager = open_manager(out / "checkpoints", config.keep)
    state = init_state(config)
    state = restore_latest(manager, state, state.frozen, data)
    manager.close()
    return state, next(data)


def assert_bitwise(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_four_steps_equal_two_and_resumed_two_bitwise_next_batch_included(tiny_run, tmp_path):
    train(tiny_run, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    train(tiny_run, tmp_path / "cut", resume=True)
    assert_bitwise(restored(tiny_run, tmp_path / "cut"), restored(tiny_run, tmp_path / "whole"))
    again = [m["step"] for m in read_metrics(tmp_path / "cut")]
    assert again == [1, 2, 3, 4, 3, 4], "the resumed run must have computed steps 3 and 4 itself"


def test_a_run_leaves_model_metrics_and_record_and_is_not_overwritten(tiny_run, tmp_path):
    bundle = train(tiny_run, tmp_path / "run", command="andesvl train")
    loaded = avl.load(tmp_path / "run" / "model")
    assert_bitwise(loaded.params, bundle.params)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["command"] == "andesvl train" and record["config"]["steps"] == 4 and "jax" in record["environment"]["packages"]
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert {"loss", "tokens_per_s", "gradient_norm", "data_wait"} <= set(read_metrics(tmp_path / "run")[-1])
    with pytest.raises(avl.UserError, match="--resume"):
        train(tiny_run, tmp_path / "run")


def test_a_part_with_rate_zero_does_not_move_and_holds_no_moments(tiny_run):
    optimizer = dataclasses.replace(tiny_run.optimizer, vision=0.0, decoder=0.0)
    config = dataclasses.replace(tiny_run, optimizer=optimizer)
    state = init_state(config)
    before = jax.tree.map(np.array, state.params)
    data = data_of(config)
    for _ in range(3):
        state, _ = train_step(state, next(data), config.model, optimizer, config.steps)
    assert_bitwise((state.params.vision, state.params.decoder), (before.vision, before.decoder))
    moved = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state.params.projector), jax.tree.leaves(before.projector))]
    assert all(moved)
    held = sum(x.size for x in jax.tree.leaves(state.optimizer) if x.ndim)
    assert held == 2 * sum(x.size for x in jax.tree.leaves(before.projector)), "two moments of the projector, nothing else"


def test_parts_have_their_own_rates(tiny_run):
    """Adam's first update is rate x sign, so update sizes show the rates; weight decay is off, warm-up is one step."""
    optimizer = dataclasses.replace(
        tiny_run.optimizer, vision=1e-3, projector=2e-3, decoder=4e-3, weight_decay=0.0, warmup_steps=0
    )
    params = init_state(tiny_run).params
    transform = make_optimizer(optimizer, describe(tiny_run.model), 100)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(transform.update)(grads, transform.init(params), params)
    for part, peak in (("vision", 1e-3), ("projector", 2e-3), ("decoder", 4e-3)):
        sizes = [float(jnp.abs(u).max()) for u in jax.tree.leaves(getattr(updates, part))]
        np.testing.assert_allclose(sizes, peak, rtol=1e-3)  # epsilon and the clipped gradient move it by less than 1e-3


def test_rates_are_those_of_optax_and_runs_of_any_length_share_a_program(tiny_run):
    optimizer = tiny_run.optimizer
    for steps in (50, 400):
        peer = optax.warmup_cosine_decay_schedule(0.0, 1.0, optimizer.warmup_steps, steps, optimizer.final_fraction)
        at = jnp.array([0, 1, optimizer.warmup_steps, steps // 2, steps, steps + 3])
        ours = jax.vmap(lambda step: rate(optimizer, step, steps))(at)
        np.testing.assert_allclose(ours, jax.vmap(peer)(at), atol=1e-6)  # float32 cosines of the same angle
    state, data = init_state(tiny_run), data_of(tiny_run)
    train_step.clear_cache()
    for steps in (50, 400):
        state, _ = train_step(state, next(data), tiny_run.model, optimizer, steps)
    assert train_step._cache_size() == 1


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tiny_run):
    state = init_state(tiny_run)
    before = jax.tree.map(np.array, (state.params, state.optimizer))
    batch = next(data_of(tiny_run))
    batch.images.patches[:] = np.nan
    state, metrics = train_step(state, batch, tiny_run.model, tiny_run.optimizer, tiny_run.steps)
    assert_bitwise((state.params, state.optimizer), before)
    assert int(metrics["skipped"]) == 1 and not np.isfinite(float(metrics["loss"]))


def test_a_run_that_stays_non_finite_stops_with_the_reason(tiny_run, tmp_path, monkeypatch):
    real = loop_lib.batches

    def poison(batch):
        batch.images.patches[:] = np.nan
        return batch

    def poisoned(*args):
        return real(*args).map(poison)

    monkeypatch.setattr(loop_lib, "batches", poisoned)
    config = dataclasses.replace(tiny_run, steps=8, checkpoint_every=8)
    with pytest.raises(avl.UserError, match="not finite"):
        train(config, tmp_path / "run")


def test_bfloat16_compute_trains_float32_parameters(tiny_run):
    model = tiny_run.model.replace(dtype="bfloat16")
    state = init_state(tiny_run)
    data = data_of(tiny_run)
    losses = []
    for _ in range(3):
        state, metrics = train_step(state, next(data), model, tiny_run.optimizer, tiny_run.steps)
        losses.append(float(metrics["loss"]))
    assert all(np.isfinite(losses)) and jax.tree.leaves(state.params)[0].dtype == jnp.float32
    loss = jax.jit(loss_sums, static_argnums=1)
    exact, *_ = loss(state.params, tiny_run.model, next(data_of(tiny_run)))
    rounded, *_ = loss(state.params, model, next(data_of(tiny_run)))
    assert abs(float(exact) - float(rounded)) < 0.02 * float(exact)  # bf16 has 8 bits of mantissa


def test_the_state_is_donated(tiny_run):
    state = init_state(tiny_run)
    train_step(state, next(data_of(tiny_run)), tiny_run.model, tiny_run.optimizer, tiny_run.steps)
    assert jax.tree.leaves(state.params)[0].is_deleted()
