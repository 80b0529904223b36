"""A disk that fills up while a checkpoint is written behind the training steps."""

import dataclasses
import resource

import pytest

from andesvl_jax.cli import main
from andesvl_jax.training import config as config_lib
from andesvl_jax.training import loop as loop_lib
from andesvl_jax.training.checkpoint import open_manager
from andesvl_jax.training.metrics import read_metrics


@pytest.mark.parametrize("full_from", [3, 4], ids=["seen at the next save", "seen at the end"])
def test_the_run_stops_with_one_sentence_and_the_checkpoint_before_stays(tiny_run, tmp_path, monkeypatch, capsys, full_from):
    """A limit on the size of files stands in for the full disk: the writers meet it in the same system call."""
    config = dataclasses.replace(tiny_run, checkpoint_every=1, keep=4)
    monkeypatch.setattr(config_lib, "load_config", lambda *_: config)
    real = loop_lib.save_checkpoint
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(manager, step, state, data):
        if step == full_from:
            manager.wait_until_finished()
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the state has 500 kB, all other files less
        real(manager, step, state, data)

    monkeypatch.setattr(loop_lib, "save_checkpoint", save)
    command = ["train", "--config", "tiny.py", "--out", str(tmp_path / "run")]
    try:
        code = main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        monkeypatch.setattr(loop_lib, "save_checkpoint", real)
    sentences = [line for line in capsys.readouterr().err.splitlines() if line.startswith("andesvl: ")]
    assert code == 2 and len(sentences) == 1
    for mention in ("checkpoints", "could not be written (File too large)", f"--resume from step {full_from - 1}"):
        assert mention in sentences[0]
    assert not (tmp_path / "run" / "model").exists()

    assert main([*command, "--resume"]) == 0
    manager = open_manager(tmp_path / "run" / "checkpoints", 4)
    assert manager.latest_step() == 4
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*")), "what the broken save left is cleared away"
    assert [m["step"] for m in read_metrics(tmp_path / "run")][full_from - 5 :] == list(range(full_from, 5))
