"""Checkpoint directories of tiny models, and ways to change them."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import tiny_config, tiny_params

import andesvl_jax as avl
from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.weights import path_name

CONFIGS = {
    "aimv2": tiny_config("aimv2"),
    "siglip2": tiny_config("siglip2"),
    "untied": tiny_config("aimv2", text={"tie_word_embeddings": False}),
    "no table": tiny_config("aimv2", vision={"table_side": None}),
    "siglip2 without table": tiny_config("siglip2", vision={"table_side": None, "use_rope": False}),
    "vision biases": tiny_config("aimv2", vision={"qkv_bias": True, "use_bias": True, "table_interpolation": "one_dim"}),
    "siglip2 without biases": tiny_config("siglip2", vision={"qkv_bias": False, "use_bias": False}),
    "llama with biases": tiny_config("siglip2", text={"attention_bias": True, "qk_norm": False}),
    "windows": tiny_config("aimv2", vision={"full_attention_layers": (0,), "window_size": 12}),
}


def bundle_of(config, seed: int = 0) -> Bundle:
    processor = ImageProcessor(patch_size=2, max_size=99)
    return Bundle(config, tiny_params(config, seed), None, processor, {"eos_token_id": [63, 62], "top_k": 7})


def assert_equal_params(found, expected):
    paths = [[path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(tree)[0]] for tree in (found, expected)]
    assert paths[0] == paths[1]
    for path, a, b in zip(paths[0], jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), path)


def change_json(path: Path, **changes):
    raw = json.loads(path.read_text())
    for key, value in changes.items():
        part = raw
        *parents, last = key.split("__")
        for parent in parents:
            part = part[parent]
        part[last] = value
    path.write_text(json.dumps(raw))


def refused(model: Path) -> str:
    """The message of the refusal: one line that starts with the file or directory at fault."""
    with pytest.raises(avl.UserError) as caught:
        avl.load(model)
    message = str(caught.value)
    assert message.startswith(str(model)) and "\n" not in message and message.endswith(".")
    return message


def split_into_shards(model: Path, count: int = 3) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    files = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, model / file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def rewrite(model: Path, change) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")
