"""Configurations: out to HF and back, and no field that does nothing."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from golden_sets import deviations, odd_set
from tiny import max_relative, random_sample, tiny_batch, tiny_config, tiny_params

import andesvl_jax as avl
from andesvl_jax.checkpoints.names import hf_shapes
from andesvl_jax.config import CONFIGS, AndesVLConfig, TextConfig, VisionConfig, from_hf, to_hf
from andesvl_jax.errors import UserError
from andesvl_jax.model.andesvl import describe, forward
from andesvl_jax.weights import is_param

GOLDEN = Path(__file__).parent / "golden"
SETS = sorted(p.parent.name for p in GOLDEN.glob("*/config.json"))


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_survive_a_round_trip_through_json(name):
    config = CONFIGS[name].replace(param_dtype="bfloat16", image_token_id=7)
    raw = json.loads(json.dumps(to_hf(config)))
    assert from_hf(raw, param_dtype=raw["torch_dtype"]) == config
    assert to_hf(from_hf(raw, param_dtype="bfloat16")) == raw


@pytest.mark.parametrize("name", SETS)
def test_golden_configs_survive_a_round_trip(name):
    config = from_hf(json.loads((GOLDEN / name / "config.json").read_text()))
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config
    assert len(SETS) == 3


def test_absent_keys_take_the_defaults_of_the_release_not_of_this_project():
    config = from_hf({"model_type": "andesvl-aimv2-qwen3", "text_config": {}, "vision_config": {}})
    assert config.vision.table_side is None and config.vision.table_interpolation == "one_dim"
    assert from_hf({"model_type": "andesvl-siglip2-qwen3", "text_config": {}, "vision_config": {}}).vision.table_side == 32


BASE = tiny_config("aimv2", vision={"full_attention_layers": (1,)})
FLIPPED_VISION = {
    "family": "siglip2", "hidden_size": 32, "intermediate_size": 28, "num_layers": 3, "num_heads": 4, "num_channels": 1,
    "patch_size": 4, "table_side": None, "table_interpolation": "one_dim", "use_rope": False, "rope_theta": 50.0,
    "norm_eps": 0.1, "hidden_act": "gelu", "qkv_bias": True, "use_bias": True, "merge_size": 1, "window_size": 4,
    "full_attention_layers": (0,),
}  # fmt: skip
FLIPPED_TEXT = {
    "vocab_size": 80, "hidden_size": 32, "intermediate_size": 40, "num_layers": 3, "num_heads": 2, "num_kv_heads": 4,
    "head_dim": 16, "rope_theta": 50.0, "norm_eps": 0.1, "qk_norm": False, "attention_bias": True, "tie_word_embeddings": False,
}  # fmt: skip


def shapes(config: AndesVLConfig):
    return [p.shape for p in jax.tree.leaves(describe(config), is_leaf=is_param)], hf_shapes(config)


@functools.cache
def output(config: AndesVLConfig):
    batch = tiny_batch(BASE, [[random_sample(BASE, np.random.default_rng(0), ((6, 8),))]], tokens=32, patches=48)
    return np.asarray(jax.jit(forward, static_argnums=1)(tiny_params(BASE), config, batch))


@pytest.mark.parametrize(("part", "field"), [("vision", f) for f in FLIPPED_VISION] + [("text", f) for f in FLIPPED_TEXT])
def test_every_field_changes_shapes_or_values_as_in_the_reference_or_is_refused(part, field):
    value = {"vision": FLIPPED_VISION, "text": FLIPPED_TEXT}[part][field]
    assert getattr(getattr(BASE, part), field) != value
    try:
        flipped = BASE.replace(**{part: dataclasses.replace(getattr(BASE, part), **{field: value})})
    except UserError as error:
        assert f"{part}.{field}" in str(error)
        return
    if shapes(flipped) == shapes(BASE):
        # 1e-4: a hundred times float32 rounding
        assert np.abs(output(flipped) - output(BASE)).max() > 1e-4
    golden = odd_set(flipped)
    assert not deviations(avl.probe(golden.bundle, golden.input_ids, golden.images), golden.expected)


def memory_of(config: AndesVLConfig) -> int:
    """Bytes that one compiled train-like step needs beside its arguments and results."""
    batch = tiny_batch(BASE, [[random_sample(BASE, np.random.default_rng(0), ((6, 8),))]], tokens=128, patches=64)
    gradient = jax.grad(lambda params, batch: forward(params, config, batch).sum())
    compiled = jax.jit(gradient).lower(tiny_params(BASE), batch).compile({"xla_backend_optimization_level": 0})  # never run
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_fields_that_keep_values_change_the_program():
    """`attention`, `attention_chunk` and `remat` are inert in values by design (tests/model/test_packed_rows.py): what they
    change is how much memory the backward pass takes. Each step of this chain flips one of them, towards less memory."""
    chain = [{"attention": "einsum"}, {"attention": "chunked"}, {"attention_chunk": 16}, {"remat": "dots"}, {"remat": "layer"}]
    config, needed = BASE.replace(attention_chunk=64), []
    for change in chain:
        config = config.replace(**change)
        needed.append(memory_of(config))
    assert all(less < 0.9 * more for more, less in itertools.pairwise(needed)), needed


def test_the_types_change_values_and_weights():
    half, exact = output(BASE.replace(dtype="bfloat16")), output(BASE)
    assert 1e-4 < max_relative(half.astype(np.float32), exact) < 0.1 and half.dtype == "bfloat16"
    assert {x.dtype.name for x in jax.tree.leaves(tiny_params(BASE.replace(param_dtype="bfloat16")))} == {"bfloat16"}


def test_the_image_token_and_the_last_position_decide_what_a_prompt_may_be():
    golden = odd_set(BASE)
    other = dataclasses.replace(golden.bundle, config=BASE.replace(image_token_id=61))
    with pytest.raises(UserError, match="0 image slots"):
        avl.probe(other, golden.input_ids, golden.images)
    limit = len(golden.input_ids) + 1
    short = BASE.replace(text=dataclasses.replace(BASE.text, max_position_embeddings=limit))
    bundle = dataclasses.replace(golden.bundle, config=short)
    avl.generate(bundle, golden.input_ids, golden.images, max_new_tokens=1)
    with pytest.raises(UserError, match="max_position_embeddings"):
        avl.generate(bundle, golden.input_ids, golden.images, max_new_tokens=2)


def test_no_field_is_forgotten_by_the_tests_above():
    vision, text, top = ({f.name for f in dataclasses.fields(c)} for c in (VisionConfig, TextConfig, AndesVLConfig))
    assert vision == set(FLIPPED_VISION)
    assert text == set(FLIPPED_TEXT) | {"max_position_embeddings"}
    parts, types = {"vision", "text", "image_token_id"}, {"dtype", "param_dtype"}
    assert top == parts | types | {"attention", "attention_chunk", "remat", "layer_loop"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vision": {"hidden_size": 18}}, "vision.hidden_size"),
        ({"vision": {"table_side": 0}}, "vision.table_side"),
        ({"vision": {"full_attention_layers": (2,)}}, "vision.full_attention_layers"),
        ({"vision": {"full_attention_layers": (1,), "window_size": 3}}, "vision.window_size"),
        ({"vision": {"num_layers": 0}}, "vision.num_layers"),
        ({"vision": {"num_layers": 2.0}}, "vision.num_layers"),
        ({"vision": {"use_rope": 1}}, "vision.use_rope"),
        ({"text": {"num_kv_heads": 3}}, "text.num_kv_heads"),
        ({"text": {"head_dim": 5}}, "text.head_dim"),
        ({"text": {"vocab_size": 0}}, "text.vocab_size"),
        ({"text": {"max_position_embeddings": 0}}, "text.max_position_embeddings"),
        ({"image_token_id": 64}, "image_token_id"),
        ({"attention": "flash"}, "attention"),
        ({"attention_chunk": 0}, "attention_chunk"),
        ({"remat": "all"}, "remat"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_impossible_configurations_are_refused_by_field(change, named):
    with pytest.raises(UserError, match=f"config field {named}: found .*, expected "):
        tiny_config(**change)
