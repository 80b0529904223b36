"""Configurations: out to HF and back, and no field that does nothing."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import random_sample, tiny_batch, tiny_config, tiny_params

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
# fields that change neither shapes nor values of the network, by design, and where they are tested
ELSEWHERE = {
    "max_position_embeddings": "a limit that generation checks: tests/decoding/test_generate.py",
    "image_token_id": "read on the host, where prompts are laid out: tests/decoding/test_generate.py",
    "param_dtype": "the type weights are read and saved in: tests/checkpoints/test_hf_layout.py",
    "attention": "another way to the same values: tests/model/test_packed_rows.py",
    "attention_chunk": "another way to the same values: tests/model/test_packed_rows.py",
    "remat": "what the backward pass recomputes, same values: tests/model/test_packed_rows.py",
    "dtype": "the type of compute: tests/model/test_packed_rows.py",
    "vision": "its fields are flipped one by one",
    "text": "its fields are flipped one by one",
}


def shapes(config: AndesVLConfig):
    return [p.shape for p in jax.tree.leaves(describe(config), is_leaf=is_param)], hf_shapes(config)


@functools.cache
def output(config: AndesVLConfig):
    batch = tiny_batch(BASE, [[random_sample(BASE, np.random.default_rng(0), ((6, 8),))]], tokens=32, patches=48)
    return np.asarray(jax.jit(forward, static_argnums=1)(tiny_params(BASE), config, batch))


@pytest.mark.parametrize(("part", "field"), [("vision", f) for f in FLIPPED_VISION] + [("text", f) for f in FLIPPED_TEXT])
def test_every_field_changes_shapes_or_values_or_is_refused(part, field):
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


def test_no_field_is_forgotten_by_the_test_above():
    vision, text, top = ({f.name for f in dataclasses.fields(c)} for c in (VisionConfig, TextConfig, AndesVLConfig))
    assert vision == set(FLIPPED_VISION)
    assert text | top == set(FLIPPED_TEXT) | set(ELSEWHERE)


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
