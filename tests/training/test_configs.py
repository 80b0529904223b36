"""Every configuration under configs/ loads, and those for slices divide among the chips that they name."""

import math
import runpy
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

import andesvl_jax as avl
from andesvl_jax.config import CONFIGS
from andesvl_jax.training.config import load_config
from andesvl_jax.training.sharding import MESH_AXES, check_budget, param_shardings

ROOT = Path(__file__).resolve().parents[2]
FILES = {name: ROOT / "configs" / f"{name}.py" for name in ("stages", "tpu")}
NAMES = {name: list(runpy.run_path(str(file))["ALL"]) for name, file in FILES.items()}
STAGES = ("alignment", "joint", "multi-task", "sft")
ADDED = {f"{model}/{stage}" for model in ("nano", "nano-siglip") for stage in ("print", "look-up")}


@pytest.mark.parametrize("name", NAMES["stages"])
def test_every_stage_loads(name):
    config = load_config(f"{FILES['stages']}:{name}", ["steps=500"])
    model = name.split("/")[0]
    assert config.steps == 500
    assert config.model == CONFIGS[model] or (config.model.dtype, config.model.param_dtype) == ("bfloat16", "float32")
    assert config.budget.patches >= config.max_size**2 // config.model.vision.patch_size**2, "a row holds the largest picture"


def test_there_are_four_stages_of_every_size():
    assert set(NAMES["stages"]) == {f"{model}/{stage}" for model in CONFIGS if model != "pico" for stage in STAGES} | ADDED
    table = runpy.run_path(str(FILES["stages"]))["table"]()
    assert table in (ROOT / "docs" / "stages.md").read_text(), "docs/stages.md: paste what `python configs/stages.py` prints"


@pytest.mark.parametrize("name", NAMES["tpu"])
def test_every_shape_for_a_slice_divides_among_its_chips(name):
    config, slice_name = load_config(f"{FILES['tpu']}:{name}"), name.split("/")[1]
    sizes = dict.fromkeys(MESH_AXES, 1) | {k: int(v) for k, v in (item.split("=") for item in config.mesh.split(","))}
    mesh = AbstractMesh(tuple(sizes.values()), MESH_AXES)
    layout = runpy.run_path(str(FILES["tpu"]))["TOPOLOGIES"][slice_name].partition(":")[2]
    assert mesh.size == int(slice_name.partition("-")[2]) == math.prod(map(int, layout.split("x")))
    check_budget(config.budget, mesh)
    param_shardings(config.model, mesh)


@pytest.mark.parametrize(
    "path, message",
    [
        (f"{FILES['stages']}:nano/sfd", r"no configuration 'nano/sfd'; expected one of 28, such as nano/sft"),
        (f"{FILES['stages']}", "stages.py: holds several, expected .*stages.py:NAME"),
        (f"{ROOT}/configs/demo.py:words", "holds one configuration, expected .*demo.py\\."),
        (f"{ROOT}/configs/none.py:words", "none.py: no such config file"),
        (f"{FILES['stages']}:", "no configuration ''"),
    ],
)
def test_a_configuration_that_there_is_not(path, message):
    with pytest.raises(avl.UserError, match=message):
        load_config(path)
