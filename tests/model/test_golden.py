"""Parity with the recorded activations of an independent float32 reference, and the shapes of the released sizes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tiny import max_relative

import andesvl_jax as avl
from andesvl_jax.checkpoints.names import hf_shapes
from andesvl_jax.config import CONFIGS
from andesvl_jax.model.andesvl import describe
from andesvl_jax.weights import count

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SETS = ("aimv2_a", "aimv2_c_multi_image_text", "siglip2_c_multi")
# float32 against float32 with other summation orders: measured 3e-6; swapping erf and tanh GELU would already be 1.3e-4
TOLERANCE = 3e-5
SIZES = {
    "andesvl-0.6b": ("0.6B", 695_069_952),
    "andesvl-1b": ("1B", 927_010_816),
    "andesvl-2b": ("2B", 2_055_731_200),
    "andesvl-4b": ("4B", 4_359_721_984),
}


@pytest.mark.parametrize("backend", ["einsum", "chunked"])
@pytest.mark.parametrize("name", SETS)
def test_every_activation_and_greedy_id_equals_the_golden_set(name, backend):
    meta = json.loads((GOLDEN / name / "meta.json").read_text())
    golden = np.load(GOLDEN / name / "golden.npz")
    bundle = avl.load(GOLDEN / name, image_token_id=505, max_size=meta["max_size"])
    # 20 divides neither the token nor the patch bucket, so the chunked backend also runs over a part-filled chunk
    bundle = dataclasses.replace(bundle, config=bundle.config.replace(attention=backend, attention_chunk=20))
    images = [golden[f"image_{i}"] for i in range(meta["n_images"])]

    found = avl.probe(bundle, golden["input_ids"], images)

    exact = {f"canvas_{i}" for i in range(len(images))} | {"grid_hw"}
    floats = {"flat_patches", "patch_embeds", "vit_embeds", "proj_embeds", "inputs_embeds", "final_hidden", "logits"}
    assert set(found) == exact | floats
    for key in exact:
        assert found[key].dtype == golden[key].dtype
        np.testing.assert_array_equal(found[key], golden[key], key)
    for key in floats:
        assert found[key].dtype == np.float32
        assert max_relative(found[key], golden[key]) <= TOLERANCE, key
    ids = avl.generate(bundle, golden["input_ids"], images, max_new_tokens=16, stop_ids=())
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, golden["greedy_ids"])


@pytest.mark.parametrize("size", SIZES)
def test_released_sizes_have_the_published_parameters_names_and_shapes(size):
    keys, parameters = SIZES[size]
    expected = {name: tuple(shape) for name, shape in json.loads((GOLDEN / "keys" / f"{keys}.json").read_text()).items()}
    assert hf_shapes(CONFIGS[size]) == expected
    assert count(describe(CONFIGS[size])) == parameters


def test_nano_is_a_network_of_two_to_five_million_parameters():
    assert 2_000_000 <= count(describe(CONFIGS["nano"])) <= 5_000_000
