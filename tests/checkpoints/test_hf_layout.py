"""Checkpoint directories: what is saved is what is loaded, and what is damaged is refused by name."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from directories import CONFIGS, assert_equal_params, bundle_of, change_json, refused, rewrite, split_into_shards
from safetensors.numpy import load_file
from tiny import tiny_config

import andesvl_jax as avl
from andesvl_jax.checkpoints import hf
from andesvl_jax.checkpoints.json_file import MAX_JSON_BYTES
from andesvl_jax.checkpoints.names import EMBEDDING, TIED_HEAD, hf_shapes
from andesvl_jax.weights import DECODER_MATRICES, Adapt, Rule, is_leaf, merge_lora, represent


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_is_loaded_bit_for_bit(name, tmp_path):
    bundle = bundle_of(CONFIGS[name])
    avl.save(bundle, tmp_path / "model")
    found = avl.load(tmp_path / "model")
    assert (found.config, found.image_processor) == (bundle.config, bundle.image_processor)
    assert found.generation_config == bundle.generation_config and found.tokenizer is None
    assert_equal_params(found.params, bundle.params)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {k: v.shape for k, v in tensors.items()} == {
        k: v for k, v in hf_shapes(bundle.config).items() if k != TIED_HEAD or not bundle.config.text.tie_word_embeddings
    }
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("family", ["aimv2", "siglip2"])
def test_bfloat16_survives_a_round_trip(family, tmp_path):
    bundle = bundle_of(tiny_config(family, dtype="bfloat16", param_dtype="bfloat16"))
    avl.save(bundle, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    found = avl.load(tmp_path / "model", dtype="bfloat16")
    assert found.config == bundle.config
    assert_equal_params(found.params, bundle.params)
    wide = avl.load(tmp_path / "model").params  # float32 is a superset
    assert_equal_params(wide, jax.tree.map(lambda x: x.astype(jnp.float32), bundle.params))


def test_shards_are_read_by_their_index(model):
    split_into_shards(model)
    assert_equal_params(avl.load(model).params, bundle_of(CONFIGS["aimv2"]).params)


def test_a_missing_shard_is_named(model):
    split_into_shards(model)
    (model / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in refused(model)


@pytest.mark.parametrize("target", ["../other/model.safetensors", "/etc/passwd", "", "..", 7])
def test_an_index_that_points_outside_its_directory_is_refused(target, model):
    shutil.copytree(model, model.parent / "other")
    split_into_shards(model)
    change_json(model / "model.safetensors.index.json", weight_map={EMBEDDING: target})
    assert "model.safetensors.index.json: weight_map" in refused(model)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(model):
    rewrite(model, lambda t: t.update({TIED_HEAD: t[EMBEDDING].copy()}))
    assert avl.load(model).params.decoder.head is None
    rewrite(model, lambda t: t.update({TIED_HEAD: t[EMBEDDING] + 1}))
    assert f"{TIED_HEAD} differs" in refused(model)


def test_every_tensor_that_does_not_fit_is_named_in_one_error(model):
    names = list(load_file(model / "model.safetensors"))
    lost, odd = names[:9], names[-9:]
    rewrite(model, lambda t: [t.pop(n) for n in lost] + [t.update({n: np.zeros((3, 1), np.float32)}) for n in odd])
    extra = [f"extra.{i}" for i in range(9)]
    rewrite(model, lambda t: t.update({n: np.zeros(2, np.float32) for n in extra}))
    message = refused(model)
    assert "9 missing" in message and "9 unknown" in message
    assert all(name in message for name in lost + odd + extra)
    assert message.count("has shape [3, 1], expected") == 9


def truncate(model: Path, keep: float):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: int(len(data) * keep)])


def config_with(**changes):
    return lambda model: change_json(model / "config.json", **changes)


DAMAGES = {
    "truncated weights": (lambda m: truncate(m, 0.7), "model.safetensors"),
    "empty weights": (lambda m: truncate(m, 0), "model.safetensors"),
    "weights that are text": (lambda m: (m / "model.safetensors").write_text("hello " * 99), "model.safetensors"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "model.safetensors"),
    "no config": (lambda m: (m / "config.json").unlink(), "config.json"),
    "no processor": (lambda m: (m / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
    "garbage config": (lambda m: (m / "config.json").write_bytes(b"\xff\x00{"), "config.json"),
    "half a config": (lambda m: (m / "config.json").write_text('{"model_type": '), "config.json"),
    "config that is a list": (lambda m: (m / "config.json").write_text("[1]"), "config.json"),
    "deeply nested config": (lambda m: (m / "config.json").write_text("[" * 200_000), "config.json"),
    "huge config": (lambda m: (m / "config.json").write_text(" " * (MAX_JSON_BYTES + 1)), "config.json"),
    "garbage generation config": (lambda m: (m / "generation_config.json").write_text("{,}"), "generation_config.json"),
    "unknown key": (config_with(rope_boost=2), "rope_boost"),
    "unknown text key": (config_with(text_config__sparse=True), "sparse"),
    "unknown vision key": (config_with(vision_config__layer_scale=True), "layer_scale"),
    "another model": (config_with(model_type="llava"), "llava"),
    "heads that do not divide": (config_with(text_config__num_key_value_heads=3), "text.num_kv_heads"),
    "vision heads that do not divide": (config_with(vision_config__num_attention_heads=3), "vision.hidden_size"),
    "odd head width": (config_with(text_config__head_dim=7), "text.head_dim"),
    "rope scaling": (config_with(text_config__rope_scaling={"factor": 2}), "rope_scaling"),
    "rope parameters": (config_with(text_config__rope_parameters={"rope_type": "yarn"}), "rope_type"),
    "sliding layers": (config_with(text_config__layer_types=["sliding_attention"] * 2), "layer_types"),
    "a text where a number belongs": (config_with(text_config__hidden_size="24"), "text.hidden_size"),
    "a list where a number belongs": (config_with(vision_config__image_size=[2]), "wrong type"),
    "patch size zero": (config_with(vision_config__patch_size=0), "vision.patch_size"),
    "another patch size": (lambda m: change_json(m / "preprocessor_config.json", patch_size=14), "patch_size"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_refused_in_one_sentence_that_names_the_file(damage, model):
    do, name = DAMAGES[damage]
    do(model)
    assert name in refused(model)


def test_a_path_that_is_no_directory_is_refused(tmp_path):
    assert "no such directory" in refused(tmp_path / "nowhere")


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["weights", "config", "last rename"])
def test_a_failed_save_leaves_the_previous_directory_as_it_was(where, model, monkeypatch):
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    if where == "weights":

        def write_half(directory, *_):
            (directory / "model.safetensors").write_bytes(b"x" * 100)
            disk_full()

        monkeypatch.setattr(hf, "write_tensors", write_half)
    elif where == "config":
        monkeypatch.setattr(hf, "write_json", disk_full)
    else:
        rename = Path.rename

        def refuse_the_new_one(self, to):
            return disk_full() if Path(to) == model and not self.name.endswith(".old") else rename(self, to)

        monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    with pytest.raises(avl.UserError, match="No space left on device") as caught:
        avl.save(bundle_of(CONFIGS["aimv2"], seed=1), model)
    assert str(caught.value).startswith(str(model))
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before
    assert [p.name for p in model.parent.iterdir()] == ["model"]
    monkeypatch.undo()
    assert_equal_params(avl.load(model).params, bundle_of(CONFIGS["aimv2"]).params)
    avl.save(bundle_of(CONFIGS["aimv2"], seed=1), model)  # and the next one goes through
    assert_equal_params(avl.load(model).params, bundle_of(CONFIGS["aimv2"], seed=1).params)


def test_a_place_that_cannot_be_written_is_an_error_for_the_user(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(avl.UserError, match="could not be written"):
        avl.save(bundle_of(CONFIGS["aimv2"]), tmp_path / "file" / "model")


def test_saving_over_a_directory_replaces_it_whole(model):
    (model / "stale.bin").write_text("from an earlier run")
    avl.save(bundle_of(CONFIGS["siglip2"]), model)
    assert "stale.bin" not in {p.name for p in model.iterdir()}
    assert avl.load(model).config == CONFIGS["siglip2"]


def test_adapters_are_refused_until_they_are_merged(tmp_path):
    bundle = bundle_of(CONFIGS["aimv2"])
    adapted = dataclasses.replace(
        bundle, params=represent(bundle.params, [Rule(DECODER_MATRICES, Adapt(2, 4.0))], jax.random.key(0))
    )
    with pytest.raises(avl.UserError, match=r"decoder\.layers\.q: a LoRA leaf"):
        avl.save(adapted, tmp_path / "model")
    assert not any(tmp_path.iterdir())
    merged = dataclasses.replace(bundle, params=merge_lora(adapted.params))
    assert not any(map(is_leaf, jax.tree.leaves(merged.params, is_leaf=is_leaf)))
    avl.save(merged, tmp_path / "model")
    assert_equal_params(avl.load(tmp_path / "model").params, merged.params)
