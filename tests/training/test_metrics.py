"""The numbers of a run: what a line of metrics holds and that each number is what its name says."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_sample, tiny_batch, tiny_config

from andesvl_jax.cli import main
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.packing import fill
from andesvl_jax.model.flops import PARTS, batch_flops
from andesvl_jax.training import config as config_lib
from andesvl_jax.training import metrics as metrics_lib
from andesvl_jax.training.loop import PROFILED, train
from andesvl_jax.training.metrics import Meter, norms, peak_memory, read_metrics
from andesvl_jax.training.peak import peak_flops
from andesvl_jax.training.step import init_state, train_step


class Device:
    def __init__(self, kind: str, stats: dict | None = None):
        self.device_kind, self.memory_stats = kind, lambda: stats


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still: tests set `now`."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(metrics_lib.time, "perf_counter", lambda: Clock.now)
    return Clock


def a_batch(rows=2):
    config, rng = tiny_config(), np.random.default_rng(0)
    return config, tiny_batch(config, [[random_sample(config, rng)] for _ in range(rows)])


def test_a_line_counts_its_own_interval(clock):
    config, batch = a_batch()
    meter = Meter(config, PARTS, [Device("TPU v4"), Device("TPU v4")])
    tokens, flops = int((batch.segments >= 0).sum()), batch_flops(config, batch, PARTS)
    for steps in (3, 2):
        for _ in range(steps):
            meter.ran([meter.draw(iter([batch]))], jnp.zeros(()))
        clock.now += 10.0
        line = meter.line()
        assert line["step_s"] == 10 / steps and line["data_wait"] == 0
        assert line["tokens_per_s"] == steps * tokens / 10
        assert line["flops_per_s"] == steps * flops / 10
        assert line["mfu"] == pytest.approx(steps * flops / 10 / (2 * 275e12))
        shares = fill(batch)
        assert {name: line[f"padding/{name}"] for name in shares} == pytest.approx({n: 1 - s for n, s in shares.items()})


def test_data_wait_is_the_time_in_which_the_devices_had_no_step(clock, monkeypatch):
    """The batch takes 4 s; the step before ends 3 s into that, so of the 10 s of the interval the devices lack work for 1."""
    config, batch = a_batch()
    ends = {"first": 5.0, "second": 9.0}
    monkeypatch.setattr(metrics_lib, "_time_when_ready", ends.get)
    meter = Meter(config, PARTS, jax.devices())

    def after(seconds):
        clock.now += seconds
        yield batch

    meter.ran([meter.draw(after(0.0))], "first")
    clock.now = 2.0
    meter.ran([meter.draw(after(4.0))], "second")  # drawn from 2 to 6
    clock.now = 10.0
    assert meter.line()["data_wait"] == pytest.approx(0.1)
    meter.draw(after(5.0))  # the step before ended at 9, this batch is asked for at 10: all of it is lost
    clock.now = 20.0
    meter.ran([batch], "second")
    assert meter.line()["data_wait"] == pytest.approx(0.5)


def test_mfu_is_told_where_the_peak_is_known_and_only_there(clock):
    config, batch = a_batch()
    for kind, expected in (
        ("TPU v5 lite", 197e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
    ):
        meter = Meter(config, PARTS, [Device(kind)])
        meter.ran([batch], jnp.zeros(()))
        clock.now += 1.0
        line = meter.line()
        assert peak_flops(kind) == expected and ("mfu" in line) == (expected is not None)
        assert "flops_per_s" in line


def test_memory_is_the_fullest_devices_or_else_the_processes():
    stats = [{"peak_bytes_in_use": 3}, {"peak_bytes_in_use": 7}, {}, None]
    assert peak_memory([Device("x", s) for s in stats]) == {"peak_device_bytes": 7}
    before = peak_memory(jax.devices())["peak_process_bytes"]
    held = np.ones(1 << 27, np.uint8)
    assert 1 << 26 < before and peak_memory(jax.devices())["peak_process_bytes"] >= before and held.size


def test_norms_per_part_are_those_of_the_parts_and_make_up_the_whole(tiny_run):
    state = init_state(tiny_run)
    tree = norms("x", state.params)
    for part in PARTS:
        leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(getattr(state.params, part))]
        np.testing.assert_allclose(tree[f"x/{part}"], np.linalg.norm(np.concatenate(leaves)), rtol=1e-5)  # float32 sums
    np.testing.assert_allclose(tree["x"], np.sqrt(sum(float(tree[f"x/{part}"]) ** 2 for part in PARTS)), rtol=1e-6)


def test_a_step_reports_the_norms_of_what_it_did(tiny_run):
    """Norm of the update = norm of the difference of the parameters; a frozen part has neither gradient nor update."""
    config = tiny_config()
    optimizer = dataclasses.replace(tiny_run.optimizer, vision=0.0, warmup_steps=0)
    state = init_state(dataclasses.replace(tiny_run, model=config, optimizer=optimizer))
    old = jax.tree.map(np.array, state.params)
    state, metrics = train_step(state, a_batch()[1], config, optimizer, 10)
    difference = norms("d", jax.tree.map(lambda a, b: a - b, state.params, old))
    for part in PARTS:
        # the difference of two rounded parameters of size 1 is good to 1e-7 / 1e-3
        np.testing.assert_allclose(metrics[f"update_norm/{part}"], difference[f"d/{part}"], rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(metrics[f"parameter_norm/{part}"], norms("p", state.params)[f"p/{part}"], rtol=1e-5)
        assert (float(metrics[f"gradient_norm/{part}"]) > 0) == (part != "vision")


def test_a_run_writes_every_number_and_a_profile(tiny_run, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(tiny_run, steps=PROFILED[1], checkpoint_every=PROFILED[1], log_every=3)
    monkeypatch.setattr(config_lib, "load_config", lambda *_: config)
    assert main(["train", "--config", "tiny.py", "--out", str(tmp_path / "run"), "--profile", "--json"]) == 0
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 3, 6]
    expected = {f"{kind}_norm{part}" for kind in ("gradient", "update", "parameter") for part in ("", *(f"/{p}" for p in PARTS))}
    expected |= {"step_s", "tokens_per_s", "flops_per_s", "data_wait", "peak_process_bytes", "seconds", "loss", "skipped"}
    expected |= {f"padding/{name}" for name in ("tokens", "patches", "targets")}
    for line in lines:
        assert expected <= set(line) and "mfu" not in line, "a CPU's peak is not known"
        assert 0 <= line["data_wait"] <= 1 and line["step_s"] > 0
        assert all(0 <= line[f"padding/{name}"] < 1 for name in ("tokens", "patches", "targets"))
    seconds = lines[0]["step_s"] + 2 * lines[1]["step_s"] + 3 * lines[2]["step_s"]
    assert seconds == pytest.approx(lines[-1]["seconds"], rel=0.05)  # the writing of two lines is not part of a step
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    assert [dict(event.stats)["step_num"] for event in events if event.name == "train"] == [4, 5, 6]
    with pytest.raises(UserError, match="--profile: 3 steps are left, expected at least 6"):
        train(dataclasses.replace(config, steps=3), tmp_path / "short", profile=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == PROFILED[1]


def test_a_batch_that_comes_while_a_step_runs_is_no_wait():
    """On the real clock: matrix products of some 0.1 s, and a batch 1 ms after they were started."""
    config, batch = a_batch()
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, y: jnp.tanh(y @ y), x).sum())
    x = jnp.ones((256, 256))
    jax.block_until_ready(slow(x))

    def during():
        time.sleep(0.001)
        yield batch

    meter = Meter(config, PARTS, jax.devices())
    meter.ran([batch], slow(x))
    meter.ran([meter.draw(during())], slow(x))
    assert meter.line()["data_wait"] < 0.5
