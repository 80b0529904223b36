"""Bytes and bits: what a model costs in memory, on disk and per cached token.

`bpw_body` counts the matrices of the decoder with everything they need (scales, padding); `bpw_all` counts every byte on disk
over every parameter, so that embeddings, encoder and adapters cannot hide.
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from andesvl_jax.checkpoints.json_file import read_json
from andesvl_jax.config import CONFIGS, AndesVLConfig, TextConfig, from_hf
from andesvl_jax.errors import UserError
from andesvl_jax.model.andesvl import AndesVL, describe
from andesvl_jax.weights import DECODER_MATRICES, count, is_leaf, path_name


def tree_bytes(params) -> int:
    """Bytes of all arrays of a tree, packed leaves as they are stored."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


def bits_per_weight(params: AndesVL, config: AndesVLConfig) -> tuple[float, float]:
    """(body, all): bits per decoder-matrix weight and per parameter of the whole model, as held in memory."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    body = sum(tree_bytes(leaf) for path, leaf in flat if re.fullmatch(DECODER_MATRICES, path_name(path)))
    text = config.text
    wide, narrow = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    weights = text.num_layers * text.hidden_size * (2 * wide + 2 * narrow + 3 * text.intermediate_size)
    return 8 * body / weights, 8 * tree_bytes(params) / count(describe(config))


def kv_bytes_per_token(text: TextConfig, dtype: str) -> int:
    """Keys and values of one token in every layer."""
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * jnp.dtype(dtype).itemsize


def describe_checkpoint(model: str) -> dict[str, Any]:
    """What `andesvl info` prints, read from config.json and file sizes: no tensor is loaded.

    Args:
      model: a checkpoint directory or a configuration name.
    """
    directory = Path(model)
    if directory.is_dir():
        raw = read_json(directory / "config.json")
        dtype = raw.get("torch_dtype", "float32")
        config = from_hf(raw, str(directory / "config.json"))
    elif model in CONFIGS:
        config, dtype = CONFIGS[model], "bfloat16"
    else:
        raise UserError(f"{model}: neither a checkpoint directory nor a configuration, expected one of {', '.join(CONFIGS)}.")
    parts = describe(config)
    parameters = {part: count(getattr(parts, part)) for part in ("vision", "projector", "decoder")}
    parameters["total"] = sum(parameters.values())
    weights = list(directory.glob("*.safetensors")) if directory.is_dir() else []
    on_disk = sum(file.stat().st_size for file in weights) if weights else None
    return {
        "parameters": parameters,
        "bytes_on_disk": on_disk,
        "bpw_body": 8 * jnp.dtype(dtype).itemsize if on_disk else None,
        "bpw_all": round(8 * on_disk / parameters["total"], 3) if on_disk else None,
        "kv_bytes_per_token": kv_bytes_per_token(config.text, dtype),
    }
