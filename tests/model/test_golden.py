"""Parity with the recorded activations of an independent float32 reference, and the shapes of the released sizes."""

import dataclasses
import json

import numpy as np
import pytest
from golden_sets import GOLDEN, STORED, TOLERANCE, deviations, golden_set
from reference import activations
from safetensors.numpy import load_file
from tiny import max_relative

import andesvl_jax as avl
from andesvl_jax.checkpoints.names import hf_shapes
from andesvl_jax.config import CONFIGS
from andesvl_jax.model.andesvl import describe
from andesvl_jax.weights import count

SIZES = {
    "andesvl-0.6b": ("0.6B", 695_069_952),
    "andesvl-1b": ("1B", 927_010_816),
    "andesvl-2b": ("2B", 2_055_731_200),
    "andesvl-4b": ("4B", 4_359_721_984),
}


@pytest.mark.parametrize("backend", ["einsum", "chunked"])
@pytest.mark.parametrize("name", STORED)
def test_every_activation_and_greedy_id_equals_the_golden_set(name, backend):
    golden = golden_set(name)
    # 20 divides neither the token nor the patch bucket, so the chunked backend also runs over a part-filled chunk
    config = golden.bundle.config.replace(attention=backend, attention_chunk=20)
    bundle = dataclasses.replace(golden.bundle, config=config)

    found = avl.probe(bundle, golden.input_ids, golden.images)

    floats = {"flat_patches", "patch_embeds", "vit_embeds", "proj_embeds", "inputs_embeds", "final_hidden", "logits"}
    assert set(found) == {f"canvas_{i}" for i in range(len(golden.images))} | {"grid_hw"} | floats
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in golden.expected.items()}
    assert not deviations(found, golden.expected)
    ids = avl.generate(bundle, golden.input_ids, golden.images, max_new_tokens=16, stop_ids=())
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, golden.greedy_ids)


@pytest.mark.parametrize("name", STORED)
def test_the_float64_reference_of_the_other_tests_equals_the_golden_sets_too(name):
    golden = golden_set(name)
    canvases = [golden.expected[f"canvas_{i}"] for i in range(len(golden.images))]
    processor = golden.bundle.image_processor
    tensors = load_file(GOLDEN / name / "model.safetensors")
    found = activations(golden.bundle.config, tensors, golden.input_ids, canvases, processor.mean, processor.std)
    assert all(max_relative(x, golden.expected[name]) <= TOLERANCE / 5 for name, x in found.items())  # measured 2.2e-6


@pytest.mark.parametrize("size", SIZES)
def test_released_sizes_have_the_published_parameters_names_and_shapes(size):
    keys, parameters = SIZES[size]
    expected = {name: tuple(shape) for name, shape in json.loads((GOLDEN / "keys" / f"{keys}.json").read_text()).items()}
    assert hf_shapes(CONFIGS[size]) == expected
    assert count(describe(CONFIGS[size])) == parameters


def test_pico_is_a_network_of_two_to_five_million_parameters_and_nano_of_eight_to_twelve():
    assert 2_000_000 <= count(describe(CONFIGS["pico"])) <= 5_000_000
    assert 8_000_000 <= count(describe(CONFIGS["nano"])) <= 12_000_000
    assert count(describe(CONFIGS["nano-siglip"])) <= 6_000_000
