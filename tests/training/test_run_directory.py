"""What may happen to a run and its directory: signals, broken checkpoints, a second run, another configuration, lost data."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import assert_bitwise, restored

from andesvl_jax.data.mixture import Mixture
from andesvl_jax.errors import RunEnded, UserError
from andesvl_jax.training import loop as loop_lib
from andesvl_jax.training.loop import train
from andesvl_jax.training.metrics import read_metrics
from andesvl_jax.training.run_directory import check_same_run, only_run


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Makes a run of four steps once; the tests work on copies."""
    made = {}

    def make(config) -> Path:
        if not made:
            made["run"] = tmp_path_factory.mktemp("whole") / "run"
            train(config, made["run"])
        return made["run"]

    return make


@pytest.fixture
def run(whole_run, tiny_run, tmp_path) -> Path:
    return Path(shutil.copytree(whole_run(tiny_run), tmp_path / "run"))


def test_sigterm_saves_and_the_resumed_run_is_the_whole_one_bitwise(tiny_run, run, tmp_path, monkeypatch, capsys):
    config, out = dataclasses.replace(tiny_run, checkpoint_every=4), tmp_path / "stopped"
    real = loop_lib.train_step

    def step(state, *args):
        if int(state.step) == 2:  # while the third step is computed
            os.kill(os.getpid(), signal.SIGTERM)
        return real(state, *args)

    monkeypatch.setattr(loop_lib, "train_step", step)
    with pytest.raises(RunEnded, match="saved step 3 .*--resume") as ended:
        train(config, out)
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(loop_lib, "train_step", real)
    train(config, out, resume=True)
    assert [m["step"] for m in read_metrics(out)] == [1, 2, 3, 4]
    assert_bitwise(restored(tiny_run, out), restored(tiny_run, run))


def flip_bytes(checkpoint: Path) -> None:
    """A bit in every KiB of the largest file: not every byte of it is of a number."""
    largest = max((f for f in checkpoint.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    raw = bytearray(largest.read_bytes())
    for place in range(512, len(raw), 1024):
        raw[place] ^= 0x10
    largest.write_bytes(raw)


def truncate_all(checkpoint: Path) -> None:
    for file in checkpoint.rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)


def lose_the_place(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "place")


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


@pytest.mark.parametrize("harm", [flip_bytes, truncate_all, lose_the_place, empty], ids=lambda f: f.__name__)
def test_a_broken_newest_checkpoint_gives_way_loudly_to_the_one_before(tiny_run, run, tmp_path, capsys, harm):
    expected = restored(tiny_run, Path(shutil.copytree(run, tmp_path / "sound")))
    harm(run / "checkpoints" / "4")
    train(tiny_run, run, resume=True)
    warning = capsys.readouterr().err
    assert "WARNING" in warning and "checkpoints/4 is broken (" in warning and "goes on from step 2" in warning
    assert [m["step"] for m in read_metrics(run)] == [1, 2, 3, 4, 3, 4]
    assert_bitwise(restored(tiny_run, run), expected)
    assert len(list((run / "broken_checkpoints").iterdir())) == 1, "what is broken is kept"


def test_when_all_checkpoints_are_broken_nothing_is_moved_and_the_newest_is_named(tiny_run, run):
    for step in ("2", "4"):
        truncate_all(run / "checkpoints" / step)
    with pytest.raises(UserError, match="checkpoints/4: cannot be restored") as error:
        train(tiny_run, run, resume=True)
    assert "\n" not in str(error.value) and sorted(os.listdir(run / "checkpoints")) == ["2", "4"]


def test_resume_auto_begins_where_there_is_nothing_and_goes_on_where_there_is(tiny_run, tmp_path):
    config = dataclasses.replace(tiny_run, steps=3, checkpoint_every=1)
    with pytest.raises(UserError, match="holds no checkpoint to resume from"):
        train(config, tmp_path / "run", resume=True)
    train(config, tmp_path / "run", resume="auto")
    train(dataclasses.replace(config, steps=4), tmp_path / "run", resume="auto")
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_second_run_in_a_directory_is_refused_and_a_killed_one_blocks_nobody(tiny_run, tmp_path):
    script = f"""
import time
from pathlib import Path
from andesvl_jax.training.run_directory import only_run
with only_run(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(600)
"""
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"process {holder.pid} on .* trains in it.*another --out"):
        train(tiny_run, tmp_path)
    holder.kill()
    holder.wait()
    with only_run(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()


def test_another_configuration_is_refused_by_its_first_field_and_free_fields_are_not(tiny_run, tmp_path, capsys):
    def changed(name, value, config=tiny_run):
        field, _, inner = name.partition(".")
        return dataclasses.replace(config, **{field: changed(inner, value, getattr(config, field)) if inner else value})

    (tmp_path / "run.json").write_text(json.dumps({"config": dataclasses.asdict(tiny_run)}))
    check_same_run(tmp_path, tiny_run)
    assert capsys.readouterr().out == ""
    for name, value in {"steps": 9, "log_every": 7, "mesh": "fsdp=-1", "optimizer.decoder": 1e-5, "tokenizer": "there"}.items():
        check_same_run(tmp_path, changed(name, value))
        assert f"resume: {name} was " in capsys.readouterr().out
    for name, value in {
        "model.text.hidden_size": 32, "data.seed": 1, "data.weights": {"shapes": 1.0, "word": 2.0}, "data.shards": 2,
        "budget.rows": 4, "loss_average": "sample", "optimizer.vision": 0.0,
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=f"another configuration: {name} was .* and is now") as error:
            check_same_run(tmp_path, changed(name, value))
        assert "\n" not in str(error.value)
    both = changed("data.seed", 1, changed("model.text.hidden_size", 32))
    with pytest.raises(UserError, match="model.text.hidden_size was 16 and is now 32"):
        check_same_run(tmp_path, both)


def test_the_loop_refuses_another_configuration(tiny_run, run):
    with pytest.raises(UserError, match="seed was 0 and is now 1"):
        train(dataclasses.replace(tiny_run, seed=1), run, resume=True)


def test_a_data_file_that_vanishes_stops_the_run_in_a_sentence_and_loses_nothing(tiny_run, tmp_path, monkeypatch):
    """Before and after are compared bitwise with a run whose file stayed."""
    data = tmp_path / "talks.jsonl"
    turns = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i} it is."}] for i in range(40)]
    data.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in turns))
    mixture = Mixture({"talks": 1.0}, files={"talks": str(data)})
    config = dataclasses.replace(tiny_run, data=mixture, checkpoint_every=1, steps=8, keep=8)
    train(config, tmp_path / "whole")
    real = loop_lib.save_checkpoint

    def save(manager, step, *args):
        real(manager, step, *args)
        if step == 2:
            data.rename(tmp_path / "away")

    monkeypatch.setattr(loop_lib, "save_checkpoint", save)
    with pytest.raises(UserError, match="No such file or directory.*talks.jsonl") as error:
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(loop_lib, "save_checkpoint", real)
    (tmp_path / "away").rename(data)
    for step in os.listdir(tmp_path / "run" / "checkpoints"):
        if step.isdecimal() and int(step) > 2:  # batches that lack what could not be read
            shutil.rmtree(tmp_path / "run" / "checkpoints" / step)
    train(config, tmp_path / "run", resume=True)
    assert_bitwise(restored(config, tmp_path / "run"), restored(config, tmp_path / "whole"))
