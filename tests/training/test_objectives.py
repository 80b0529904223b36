"""Objectives against naive forms of them: values, gradients, chunks; and what a step does with several micro-batches."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import max_relative, random_sample, tiny_batch, tiny_config, tiny_params, worst_leaf

from andesvl_jax.checkpoints.hf import save
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.packing import Budget
from andesvl_jax.model.decoder import logits
from andesvl_jax.training.config import TrainConfig
from andesvl_jax.training.loop import train
from andesvl_jax.training.metrics import read_metrics
from andesvl_jax.training.objectives import Distillation, distillation, token_log_probs
from andesvl_jax.training.step import init_state, loss_sums, train_step

CONFIG = tiny_config(text={"tie_word_embeddings": False})
TEMPERATURE, MIX = 2.0, 0.7


def problem():
    rng = np.random.default_rng(0)
    hidden, taught = (jnp.asarray(rng.normal(size=(2, 12, 24)), jnp.float32) for _ in range(2))
    slots = jnp.asarray([[0, 3, 4, 9, -1], [2, 5, -1, -1, -1]])
    targets = jnp.asarray(rng.integers(0, 64, (2, 5)))
    weights = jnp.asarray(rng.random((2, 5)) * (np.asarray(slots) >= 0), jnp.float32)
    return hidden, taught, slots, targets, weights


def naive(student, teacher, hidden, taught, slots, targets, weights):
    """The same sums with all logits at once."""
    pick = jax.vmap(lambda x, at: x[at])
    ours, theirs = (logits(p.decoder, pick(x, slots)) for p, x in ((student, hidden), (teacher, taught)))
    entropy = -jnp.take_along_axis(jax.nn.log_softmax(ours), targets[..., None], -1)[..., 0]
    p, q = jax.nn.log_softmax(theirs / TEMPERATURE), jax.nn.log_softmax(ours / TEMPERATURE)
    divergence = (jnp.exp(p) * (p - q)).sum(-1)
    return ((1 - MIX) * entropy + MIX * TEMPERATURE**2 * divergence).ravel() @ weights.ravel()


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_distillation_and_its_gradient_equal_the_naive_form(chunk):
    student, teacher = tiny_params(CONFIG), tiny_params(CONFIG, seed=1)
    hidden, taught, *rest = problem()

    def ours(student, teacher, hidden, taught):
        return distillation((student, teacher), hidden, taught, *rest, TEMPERATURE, MIX, chunk)[0]

    def theirs(student, teacher, hidden, taught):
        return naive(student, teacher, hidden, taught, *rest)

    arguments = student, teacher, hidden, taught
    found, gradient = jax.jit(jax.value_and_grad(ours, (0, 1, 2, 3)))(*arguments)
    expected, naive_gradient = jax.jit(jax.value_and_grad(theirs, (0, 2)))(*arguments)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert worst_leaf(gradient[0].decoder.head, naive_gradient[0].decoder.head)[0] <= 1e-5  # float32, summed by chunks
    assert max_relative(gradient[2], naive_gradient[1]) <= 1e-5
    assert not any(np.any(x) for x in jax.tree.leaves((gradient[1], gradient[3]))), "a teacher learns nothing"


def test_the_divergence_is_that_of_numpy_in_double_precision_and_zero_from_oneself():
    student, teacher = tiny_params(CONFIG), tiny_params(CONFIG, seed=1)
    hidden, taught, slots, targets, weights = problem()
    *_, metrics = distillation((student, teacher), hidden, taught, slots, targets, weights, 1.0, 1.0)
    total = 0.0
    for row, column in np.argwhere(np.asarray(slots) >= 0):
        at = int(slots[row, column])
        p, q = (
            np.asarray(tree.decoder.head, np.float64) @ np.asarray(x[row, at], np.float64)
            for tree, x in ((teacher, taught), (student, hidden))
        )
        p, q = (z - np.log(np.exp(z - z.max()).sum()) - z.max() for z in (p, q))
        total += float(weights[row, column]) * float((np.exp(p) * (p - q)).sum())
    assert float(metrics["kl"]) == pytest.approx(total, rel=1e-5)  # float32 sums of 64 terms
    *_, same = distillation((student, student), hidden, hidden, slots, targets, weights, 1.0, 1.0)
    assert abs(float(same["kl"])) < 1e-6


@pytest.mark.parametrize("chunk", [2, 1024])
def test_log_probabilities_of_tokens_and_their_gradient(chunk):
    params = tiny_params(CONFIG)
    hidden, _, slots, targets, _ = problem()
    mask = slots >= 0

    def ours(params, hidden):
        return jnp.where(mask, token_log_probs(params, hidden, slots, targets, chunk), 0)

    def theirs(params, hidden):
        scores = jax.nn.log_softmax(logits(params.decoder, jax.vmap(lambda x, at: x[at])(hidden, slots)))
        return jnp.where(mask, jnp.take_along_axis(scores, targets[..., None], -1)[..., 0], 0)

    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=slots.shape), jnp.float32)
    (found, pull), (expected, naive_pull) = jax.vjp(ours, params, hidden), jax.vjp(theirs, params, hidden)
    assert max_relative(found, expected) <= 1e-6
    for a, b in zip(pull(cotangent), naive_pull(cotangent), strict=True):
        assert worst_leaf(a, b)[0] <= 1e-5  # float32, summed by chunks


def batch_of(samples, targets: int = 24):
    return tiny_batch(CONFIG, [[s] for s in samples], targets=targets)


def test_two_micro_batches_are_one_batch_of_both():
    """Whatever they weigh: the denominator is that of the step. The second one has a fifth of the first one's tokens."""
    rng = np.random.default_rng(0)
    long, short = ([random_sample(CONFIG, rng, text=n) for _ in range(2)] for n in (40, 8))
    run = TrainConfig(model=CONFIG, steps=30)
    states = [init_state(run, tiny_params(CONFIG)) for _ in range(2)]
    whole, metrics = train_step(states[0], batch_of(long + short), CONFIG, run.optimizer, run.steps)
    parts, found = train_step(states[1], [batch_of(long), batch_of(short)], CONFIG, run.optimizer, run.steps)
    for name in ("loss", "gradient_norm", "targets", "tokens"):
        assert float(found[name]) == pytest.approx(float(metrics[name]), rel=1e-6), name
    # first moments are a tenth of the gradient; float32 sums in another order
    assert worst_leaf(parts.optimizer, whole.optimizer)[0] <= 2e-5


def test_a_run_of_micro_batches_resumes_bitwise(tiny_run, tmp_path):
    config = dataclasses.replace(tiny_run, accumulate=2, budget=dataclasses.replace(tiny_run.budget, rows=1))
    whole = train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    cut = train(config, tmp_path / "cut", resume=True)
    for a, b in zip(jax.tree.leaves(cut.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_distils_a_teacher_that_fits(tiny_run, tmp_path):
    teacher = train(dataclasses.replace(tiny_run, seed=3), tmp_path / "teacher")
    distilled = Distillation(str(tmp_path / "teacher" / "model"), temperature=TEMPERATURE, mix=MIX)
    config = dataclasses.replace(tiny_run, objective=distilled)
    train(config, tmp_path / "whole")
    lines = read_metrics(tmp_path / "whole")
    assert lines[-1]["kl"] < lines[0]["kl"]
    for line in lines:
        assert line["loss"] == pytest.approx((1 - MIX) * line["cross_entropy"] + MIX * TEMPERATURE**2 * line["kl"], rel=1e-4)
    text = dataclasses.replace(teacher.config.text, vocab_size=1060)
    other = teacher.config.replace(text=text)
    save(dataclasses.replace(teacher, config=other, params=tiny_params(other)), tmp_path / "other")
    with pytest.raises(UserError, match="objective.teacher: .* has 1060 tokens, expected 1050"):
        train(dataclasses.replace(config, objective=Distillation(str(tmp_path / "other"))), tmp_path / "run")


def test_a_teacher_that_is_the_student_has_no_divergence():
    params = tiny_params(CONFIG)
    batch = batch_of([random_sample(CONFIG, np.random.default_rng(0)) for _ in range(2)])
    total, _, metrics = jax.jit(
        lambda p, t: loss_sums(p, CONFIG, batch, None, t, Distillation("a teacher"), reference_config=CONFIG)
    )(params, params)
    assert abs(float(total)) < 1e-4 and float(metrics["cross_entropy"]) > 1


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"mix": 1.5}, {"temperature": float("nan")}])
def test_settings_of_an_objective_that_cannot_be_are_refused(settings):
    with pytest.raises(UserError, match="objective"):
        Distillation("teacher", **settings)


def test_less_than_one_micro_batch_is_refused():
    with pytest.raises(UserError, match="accumulate: found 0"):
        TrainConfig(accumulate=0, budget=Budget(1, 64, 64, 8))
