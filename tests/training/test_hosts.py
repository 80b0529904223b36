"""Several processes as one run: two real ones with four CPU devices each, over gloo, compute and save what one does."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import xla_flags

import andesvl_jax as avl
from andesvl_jax.training import hosts
from andesvl_jax.training.metrics import read_metrics
from andesvl_jax.training.sharding import MESH_AXES

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
CONFIG = """
from andesvl_jax.config import AndesVLConfig, TextConfig, VisionConfig
from andesvl_jax.data.mixture import Mixture
from andesvl_jax.inputs.packing import Budget
from andesvl_jax.training.config import Optimizer, TrainConfig

def get_config():
    model = AndesVLConfig(
        vision=VisionConfig(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, table_side=4),
        text=TextConfig(
            vocab_size=1050, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
            max_position_embeddings=512,
        ),
    )
    return TrainConfig(
        model=model, tokenizer=TOKENIZER, data=Mixture({"word": 1.0}, shards=2), steps=STEPS, checkpoint_every=2, keep=4,
        budget=Budget(rows=8, tokens=64, patches=128, targets=48), log_every=1, optimizer=Optimizer(warmup_steps=2),
        mesh="data=2,fsdp=-1",
    )
"""


@dataclass
class Launch:
    codes: list[int]
    errors: list[str]  # standard error of each process


@pytest.fixture(scope="module")
def launch(tokenizer_dir, tmp_path_factory):
    """Runs `andesvl train` in processes that find each other by the environment."""
    config = tmp_path_factory.mktemp("config") / "tiny.py"
    config.write_text(CONFIG.replace("TOKENIZER", repr(str(tokenizer_dir))).replace("STEPS", str(STEPS)))

    def run(out: Path, processes: int, devices: int, *arguments: str, events: dict[int, str] = {}) -> Launch:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for number in range(processes):
            environment = os.environ | {
                "XLA_FLAGS": xla_flags(devices), "PYTHONPATH": str(ROOT),
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number),
            }  # fmt: skip
            script = str(Path(__file__).with_name("one_process.py"))
            command = [sys.executable, script, events.get(number, "none"), "train", "--config", str(config), "--out", str(out)]
            started.append(
                subprocess.Popen(
                    [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )
        try:
            errors = [process.communicate(timeout=300)[1] for process in started]
        finally:
            for process in started:
                process.kill()
        return Launch([process.returncode for process in started], errors)

    return run


def losses(out: Path) -> list[float]:
    """By step; the last value where a step was computed twice."""
    by_step = {m["step"]: m["loss"] for m in read_metrics(out)}
    assert list(sorted(by_step)) == list(range(1, len(by_step) + 1))
    return [by_step[step] for step in sorted(by_step)]


def sentence(text: str) -> str:
    """The one line that is ours."""
    ours = [line for line in text.splitlines() if line.startswith("andesvl: ")]
    assert len(ours) == 1, text[-3000:]
    return ours[0]


@pytest.fixture(scope="module")
def alone(launch, tmp_path_factory) -> Path:
    """One process with eight devices, to the end."""
    out = tmp_path_factory.mktemp("alone") / "run"
    done = launch(out, 1, 8)
    assert done.codes == [0], done.errors[0][-3000:]
    return out


@pytest.fixture(scope="module")
def killed(launch, tmp_path_factory) -> tuple[Path, Launch]:
    """Two processes with four devices each, of which the second is killed before its last step."""
    out = tmp_path_factory.mktemp("killed") / "run"
    return out, launch(out, 2, 4, events={1: f"SIGKILL@{STEPS}"})


def test_two_processes_have_the_losses_of_one_and_when_one_is_killed_the_other_says_so(alone, killed):
    out, done = killed
    found = losses(out)
    assert len(found) >= STEPS - 2
    np.testing.assert_allclose(found, losses(alone)[: len(found)], atol=1e-5, rtol=0)  # float32, other orders of sums
    assert done.codes == [75, -9]
    assert "another process of the run is gone; start all processes again with --resume" in sentence(done.errors[0])
    assert not (out / "model").exists()


def test_what_two_processes_saved_goes_on_in_one_with_the_same_examples(launch, alone, killed, tmp_path):
    out = Path(shutil.copytree(killed[0], tmp_path / "run"))
    done = launch(out, 1, 4, "--resume", "--mesh", "fsdp=-1")
    assert done.codes == [0], done.errors[0][-3000:]
    assert "WARNING" not in done.errors[0]
    np.testing.assert_allclose(losses(out), losses(alone), atol=1e-5, rtol=0)
    place = [json.loads((run / f"checkpoints/{STEPS}/place/metadata").read_text())["data"] for run in (out, alone)]
    assert place[0] == place[1], "the next examples are those of the run that was never stopped"
    assert avl.load(out / "model").config == avl.load(alone / "model").config


@pytest.mark.slow
def test_sigterm_to_one_process_saves_on_all_and_resume_on_the_same_topology_is_bitwise(launch, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert launch(whole, 2, 4).codes == [0, 0]
    done = launch(cut, 2, 4, events={1: "SIGTERM@3"})
    assert done.codes == [143, 143], "\n".join(text[-2500:] for text in done.errors)
    said = {sentence(text).partition(": SIGTERM: ")[2] for text in done.errors}
    assert len(said) == 1 and "go on with --resume" in said.pop(), "both stop after the same step"
    shutil.rmtree(cut / "checkpoints" / "2")  # what is left is what the signal saved
    assert launch(cut, 2, 4, "--resume", "auto").codes == [0, 0]
    assert losses(cut) == losses(whole)
    for file in (f"checkpoints/{STEPS}/place/metadata", "model/model.safetensors"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.slow
def test_two_processes_that_share_every_row_have_the_losses_of_one(launch, alone, tmp_path):
    done = launch(tmp_path / "run", 2, 4, "--mesh", "context=-1")
    assert done.codes == [0, 0], "\n".join(text[-2500:] for text in done.errors)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_when_the_first_process_is_killed_the_other_says_so_too(launch, tmp_path):
    done = launch(tmp_path / "run", 2, 4, events={0: "SIGKILL@4"})
    assert done.codes == [-9, 75]
    assert "another process of the run is gone; start all processes again with --resume" in sentence(done.errors[1])


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_an_error_in_one_process_ends_all_and_is_told_by_the_one(launch, tmp_path, number):
    done = launch(tmp_path / "run", 2, 4, events={number: "error@3"})
    assert (done.codes[number], done.codes[1 - number]) == (2, 75), "\n".join(text[-2500:] for text in done.errors)
    assert f"process {number}: data: found nonsense, expected sense." in sentence(done.errors[number])
    assert "is gone" in sentence(done.errors[1 - number])


@pytest.mark.slow
def test_a_checkpoint_that_is_broken_gives_way_in_all_processes(launch, alone, killed, tmp_path):
    out = Path(shutil.copytree(killed[0], tmp_path / "run"))
    newest = max((d for d in (out / "checkpoints").iterdir() if d.name.isdecimal()), key=lambda d: int(d.name))
    file = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    os.truncate(file, 100)
    done = launch(out, 2, 4, "--resume")
    if newest.name == "2":  # the save of step 4 had not ended when the process was killed
        assert done.codes == [2, 2] and all("checkpoints/2: cannot be restored" in sentence(text) for text in done.errors)
        return
    assert done.codes == [0, 0], "\n".join(text[-2500:] for text in done.errors)
    assert "checkpoints/4 is broken" in sentence(done.errors[0]) and "goes on from step 2" in done.errors[0]
    np.testing.assert_allclose(losses(out), losses(alone), atol=1e-5, rtol=0)


def mesh_of(order: list[int], data=1, fsdp=1, context=1, tensor=1):
    """A mesh whose devices belong to these processes, in its order."""
    devices = np.array([SimpleNamespace(process_index=number) for number in order]).reshape(data, fsdp, context, tensor)
    return SimpleNamespace(devices=devices, shape=dict(zip(MESH_AXES, devices.shape, strict=True)))


@pytest.mark.parametrize(
    "mesh, shares",
    [
        (mesh_of([0, 0, 1, 1], fsdp=4), [(0, 2), (1, 2)]),
        (mesh_of([1, 0, 1, 0], data=2, fsdp=2), [(1, 2), (0, 2)]),  # parts in the order of their first rows
        (mesh_of([0, 0, 1, 1], data=2, tensor=2), [(0, 2), (1, 2)]),
        (mesh_of([0, 1, 2, 3], data=2, tensor=2), [(0, 2), (0, 2), (1, 2), (1, 2)]),  # tensor spans processes: the same rows
        (mesh_of([0, 1], tensor=2), [(0, 1), (0, 1)]),
        (mesh_of([0, 0, 1, 1, 2, 2, 3, 3], fsdp=2, context=2, tensor=2), [(0, 2), (0, 2), (1, 2), (1, 2)]),  # so does context
    ],
)
def test_every_process_makes_the_rows_that_its_devices_hold(mesh, shares):
    assert [hosts.data_share(mesh, number) for number in range(len(shares))] == shares


@pytest.mark.parametrize("mesh", [mesh_of([0, 0, 0, 1], fsdp=4), mesh_of([0, 0, 0, 1, 1, 1], fsdp=3, tensor=2)])
def test_rows_that_would_lie_unevenly_are_refused(mesh):
    with pytest.raises(avl.UserError, match="choose another --mesh"):
        hosts.data_share(mesh, 0)


@pytest.mark.parametrize(
    "given",
    [
        {"JAX_NUM_PROCESSES": "2"},
        {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
        {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_PROCESS_ID": "0"},
    ],
)
def test_variables_that_do_not_fit_together_are_refused(given, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(avl.UserError, match="expected JAX_COORDINATOR_ADDRESS=host:port"), hosts.joined():
        pass


@pytest.mark.parametrize("given", [{}, {"JAX_NUM_PROCESSES": "1"}, {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"}])
def test_a_process_alone_joins_nobody(given, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KeyError), hosts.joined():
        raise KeyError("and its errors stay its own")
