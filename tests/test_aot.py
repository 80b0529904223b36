"""`andesvl aot`: it says of a program what the compiler says; what does not fit or does not exist is told in a sentence."""

import importlib.util
import json
import runpy
from pathlib import Path

import jax
import pytest
from tiny import tiny_config

import andesvl_jax as avl
from andesvl_jax import aot
from andesvl_jax.cli import main
from andesvl_jax.inputs.packing import Budget
from andesvl_jax.model.andesvl import describe
from andesvl_jax.model.devices import target_platform
from andesvl_jax.training.config import TrainConfig
from andesvl_jax.training.sharding import make_mesh
from andesvl_jax.weights import count

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu-aot]'")
CONFIG = TrainConfig(model=tiny_config(vision={"num_layers": 1}), budget=Budget(4, 48, 64, 24))
FILE = """
from dataclasses import replace
from andesvl_jax.config import CONFIGS
from andesvl_jax.inputs.packing import Budget
from andesvl_jax.training.config import TrainConfig

def get_config(name):
    model = CONFIGS[name].replace(dtype="bfloat16", remat="layer")
    vision, text = replace(model.vision, num_layers=1), replace(model.text, num_layers=2)
    return TrainConfig(model=model.replace(vision=vision, text=text), budget=Budget(4, 64, 64, 32))
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")  # the verb turns it off; put back for what the tests start
    (tmp_path / "short.py").write_text(FILE)
    return tmp_path / "short.py"


@pytest.mark.parametrize("step", aot.STEPS)
def test_the_account_of_a_program_is_the_compilers(step):
    """On this machine's own devices, so that it needs no libtpu."""
    mesh = make_mesh("data=-1", jax.devices()[:1])
    found = aot.step_cost(CONFIG, mesh, step, limit=None)
    hbm = found.hbm
    assert found.fits and found.advice is None and found.compile_seconds > 0
    assert found.hbm_bytes_per_device == sum(hbm.values()) - 2 * hbm["aliased"]
    parameters = 4 * count(describe(CONFIG.model))
    if step == "train":  # parameters and both moments come in, and go out in the same place
        assert 3 * parameters <= hbm["aliased"] <= hbm["outputs"] <= 3 * parameters + 4096
        assert 3 * parameters < hbm["arguments"] < 3 * parameters + 600_000
    else:
        assert hbm["arguments"] < parameters + 600_000
    if step == "decode":  # the cache
        assert hbm["aliased"] >= 2 * CONFIG.model.text.num_layers * 4 * (48 + aot.NEW_TOKENS) * 2 * 8 * 4
    assert 0.45 < found.flops_per_step / found.xla_flops_per_device < 1.5  # XLA's holds what is no matrix product


def test_on_fewer_bytes_it_does_not_fit_and_says_what_helps():
    mesh = make_mesh("data=-1", jax.devices()[:1])
    held = aot.step_cost(CONFIG, mesh, "train", limit=1)
    assert not held.fits and "take a larger slice" in held.advice
    more = int(held.hbm["arguments"] / 0.5)
    assert "model.remat=layer" in aot.knob(CONFIG, mesh, "train", held.hbm["arguments"], more)
    recomputed = TrainConfig(model=CONFIG.model.replace(remat="layer"), budget=CONFIG.budget)
    assert "--set budget.rows=1 leaves" in aot.knob(recomputed, mesh, "train", held.hbm["arguments"], more)


@pytest.mark.parametrize(
    "message, needed, available",
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (19.83G) exceeds available HBM (15.75G). HLO module: jit_train_step.", 19.83, 15.75,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 32.50G of 31.24G hbm. Exceeded", 32.5, 31.24),
        ("RESOURCE_EXHAUSTED: something else", None, None),
    ],
)  # fmt: skip
def test_xla_says_how_much_is_missing(message, needed, available):
    gib = lambda x: None if x is None else int(x * aot.GIB)  # noqa: E731
    assert (aot._bytes(aot._NEEDED, message), aot._bytes(aot._AVAILABLE, message)) == (gib(needed), gib(available))


@pytest.mark.parametrize("name", ["bogus", "v5e:", "v5e:4", "v5e:0x4", "v5e:99999x99999", "v5e:4x4;rm", "v5e:" + "9" * 99, ""])
def test_what_is_no_topology_is_refused(name):
    with pytest.raises(avl.UserError, match="no topology of at most 16,384 chips, expected"):
        aot.topology_devices(name)


@needs_libtpu
def test_every_shape_of_the_table_can_be_laid_out_on_its_slice():
    """4 x 16 on 8 x 8 chips among them."""
    table = runpy.run_path(str(Path(__file__).resolve().parents[1] / "configs" / "tpu.py"))
    for name, config in table["ALL"].items():
        devices = aot.topology_devices(table["TOPOLOGIES"][name.split("/")[1]])
        assert make_mesh(config.mesh, devices).size == len(devices)


def test_without_libtpu_it_says_what_to_install(monkeypatch, file, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["aot", "--config", f"{file}:nano", "--topology", "v5e:2x2"]) == 2
    assert "pip install 'andesvl-jax[tpu-aot]'" in capsys.readouterr().err


def test_the_verb_prints_a_table_and_the_stable_keys(monkeypatch, file, capsys):
    monkeypatch.setattr(aot, "topology_devices", lambda name: jax.devices()[:1])
    assert main(["aot", "--config", f"{file}:nano", "--topology", "v5e:1x1", "--step", "decode", "--json"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    keys = "topology devices device_kind fits hbm_bytes_per_device hbm_limit flops_per_step collectives compile_seconds"
    assert set(keys.split()) < set(result) and list(result["steps"]) == ["decode"]
    assert result["hbm_limit"] is None and result["steps"]["decode"]["hbm_bytes_per_device"] == result["hbm_bytes_per_device"]
    assert any(line.startswith("temporaries") for line in table)


@needs_libtpu
@pytest.mark.slow
def test_steps_compile_for_a_slice_that_is_not_there(file, capsys):
    assert main(["aot", "--config", f"{file}:nano", "--topology", "v5e:2x2", "--mesh", "fsdp=2,tensor=2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["devices"], result["device_kind"], result["hbm_limit"]) == (4, "TPU v5 lite", int(15.75 * aot.GIB))
    assert list(result["steps"]) == list(aot.STEPS)
    layers, f, d = 2, 384, 128
    train, decode = result["steps"]["train"], result["steps"]["decode"]
    assert train["collectives"]["all-gather"]["bytes"] > layers * 3 * f * d * 2 // 2  # bfloat16, cut by tensor, each layer's
    assert decode["collectives"].get("all-gather", {"bytes": 0})["bytes"] < 1024, "a token waits for no weight"
    assert train["hbm"]["arguments"] > decode["hbm"]["arguments"]


@needs_libtpu
def test_what_does_not_fit_ends_with_one_and_a_sentence(file, capsys):
    """The whole 2B state on each of four chips; XLA refuses before it compiles anything."""
    options = ["--set", "model.text.num_layers=28", "--set", "model.vision.num_layers=24"]
    verb = ["aot", "--config", f"{file}:andesvl-2b", "--topology", "v5e:2x2", "--step", "train", "--json"]
    assert main([*verb, "--mesh", "data=-1", *options]) == 1
    *_, sentence, last = capsys.readouterr().out.splitlines()
    assert not json.loads(last)["fits"]
    assert sentence.startswith("train: needs ") and "GiB too much; parameters and moments fill the device: move" in sentence


@needs_libtpu
def test_a_topology_that_libtpu_does_not_know():
    with pytest.raises(avl.UserError, match="--topology v9:2x2: libtpu refuses it .*v9"):
        aot.topology_devices("v9:2x2")


@needs_libtpu
def test_a_program_knows_what_it_will_run_on():
    assert target_platform() == "cpu"
    with jax.sharding.set_mesh(make_mesh("data=-1", aot.topology_devices("v5e:2x2"))):
        assert target_platform() == "tpu"
