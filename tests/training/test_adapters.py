"""Fine-tuning with adapters: the base is untouched, runs resume exactly, on a mesh and over packed weights."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import xla_flags

import andesvl_jax as avl
from andesvl_jax.checkpoints.hf import save
from andesvl_jax.errors import UserError
from andesvl_jax.training.config import Adapters, TrainConfig
from andesvl_jax.training.loop import train
from andesvl_jax.training.metrics import read_metrics
from andesvl_jax.weights import LoRA, is_leaf

ADAPTERS = Adapters(vision=2, projector=3, decoder=4, alpha=8.0)


def leaves(params):
    return jax.tree.leaves(params, is_leaf=is_leaf)


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer_dir):
    """A directory with a base model for `tiny_run`'s network, and its tokenizer."""
    from andesvl_jax.checkpoints.bundle import Bundle
    from andesvl_jax.config import AndesVLConfig, TextConfig, VisionConfig
    from andesvl_jax.inputs.image import ImageProcessor
    from andesvl_jax.inputs.tokenizer import Tokenizer
    from andesvl_jax.model.andesvl import describe
    from andesvl_jax.weights import initialize

    path = tmp_path_factory.mktemp("base") / "model"
    config = AndesVLConfig(
        vision=VisionConfig(hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, table_side=4),
        text=TextConfig(
            vocab_size=1050, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
            max_position_embeddings=512,
        ),
    )  # fmt: skip
    tokenizer = Tokenizer.load(tokenizer_dir)
    params = initialize(describe(config), jax.random.key(7), "float32")
    save(Bundle(config.replace(image_token_id=tokenizer.image_token_id), params, tokenizer, ImageProcessor(patch_size=14)), path)
    return path


@pytest.fixture
def run_config(tiny_run, base) -> TrainConfig:
    return dataclasses.replace(tiny_run, init_from=str(base), tokenizer=None, adapters=ADAPTERS)


def test_a_run_trains_adapters_alone_and_writes_what_load_puts_over_the_base(run_config, base, tmp_path):
    bundle = train(run_config, tmp_path / "run")
    adapters = [w for w in leaves(bundle.params) if isinstance(w, LoRA)]
    assert len(adapters) == 5 + 2 + 7
    assert all(float(jnp.abs(w.b).max()) > 0 for w in adapters), "each adapter has learned something"
    bare = jax.tree.map(lambda w: w.base if isinstance(w, LoRA) else w, bundle.params, is_leaf=is_leaf)
    for a, b in zip(jax.tree.leaves(bare), jax.tree.leaves(avl.load(base).params), strict=True):
        np.testing.assert_array_equal(a, b)
    loaded = avl.load(base, adapter=tmp_path / "run" / "adapter")
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(bundle.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # alpha / rank is divided again
    assert not (tmp_path / "run" / "model").exists()
    ids = avl.generate(loaded, [5, 6, 7], max_new_tokens=4, stop_ids=())
    np.testing.assert_array_equal(ids, avl.generate(bundle, [5, 6, 7], max_new_tokens=4, stop_ids=()))
    metadata = json.loads((tmp_path / "run" / "checkpoints" / "4" / "state" / "_METADATA").read_text())["tree_metadata"]
    held = {name for name, value in metadata.items() if value["value_metadata"]["value_type"] == "jax.Array"}
    ends = {name.rpartition(", ")[2] for name in held if "'trained'" in name or "'frozen'" in name}
    assert ends == {"'a')", "'b')"}, "the base is not in the checkpoints"


def test_a_run_with_adapters_resumes_bitwise_over_its_own_base_alone(run_config, base, tmp_path):
    whole = train(run_config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    cut = train(run_config, tmp_path / "cut", resume=True)
    for a, b in zip(jax.tree.leaves(cut.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [m["step"] for m in read_metrics(tmp_path / "cut")] == [1, 2, 3, 4, 3, 4]
    other = avl.load(base)
    changed = other.params.replace(projector=jax.tree.map(lambda x: x + 1, other.params.projector))
    save(dataclasses.replace(other, params=changed), tmp_path / "other")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    with pytest.raises(UserError, match="over other frozen weights than init_from gives now"):
        train(dataclasses.replace(run_config, init_from=str(tmp_path / "other")), tmp_path / "cut", resume=True)


@functools.cache
def on_meshes(base_kind: str) -> dict:
    script = Path(__file__).with_name("adapters_on_eight_devices.py")
    flags = {"XLA_FLAGS": xla_flags(8), "PYTHONPATH": str(script.parents[2]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, script, base_kind], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("base_kind", ["packed", pytest.param("dense", marks=pytest.mark.slow)])
def test_a_mesh_trains_adapters_as_one_device_does(base_kind):
    found = on_meshes(base_kind)
    np.testing.assert_allclose(found["mesh"]["losses"], found["one"]["losses"], atol=1e-5, rtol=0)  # float32, other sums
    assert found["one"]["losses"][-1] < found["one"]["losses"][0]
    # gradients and moments of adapters alone: nothing as large as the base is summed over the devices
    assert found["mesh"]["summed"] < 6 * found["adapter_bytes"] + 2**14
    assert found["one"]["moment_bytes"] == 2 * found["adapter_bytes"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": None}, "there is no base, expected init_from"),
        ({"adapters": Adapters(decoder=-1)}, "adapter rank: found -1"),
        ({"adapters": Adapters(decoder=2, matrices="query")}, "matches none of the"),
    ],
)
def test_adapters_that_cannot_be_are_refused(run_config, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(run_config, **changes), tmp_path / "run")


def test_a_part_without_a_rate_can_have_no_adapters(run_config):
    with pytest.raises(UserError, match="optimizer.vision: found 0, expected a learning rate"):
        dataclasses.replace(run_config, optimizer=dataclasses.replace(run_config.optimizer, vision=0.0))
