"""Bytes and bits: what a model costs in memory, on disk and per cached token.

`bpw_body` counts the matrices of the decoder with everything they need (scales, padding); `bpw_all` counts every byte on disk
over every parameter, so that embeddings, encoder and adapters cannot hide.
"""

import re
from pathlib import Path
from typing import Any, Sequence

import jax
import jax.numpy as jnp

from andesvl_jax.checkpoints.json_file import read_json
from andesvl_jax.checkpoints.locate import shipped_directory
from andesvl_jax.checkpoints.names import entries
from andesvl_jax.checkpoints.reading import stored_tensors
from andesvl_jax.config import CONFIGS, AndesVLConfig, TextConfig, from_hf
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.image import ImageProcessor, image_size, plan_size
from andesvl_jax.model.andesvl import AndesVL, describe
from andesvl_jax.weights import DECODER_MATRICES, count, is_leaf, path_name

# part -> prefix of its HF tensor names; the embedding is a part of the decoder
PARTS = {
    "vision": "vision_encoder.", "projector": "mlp.", "decoder": "language_model.",
    "embedding": "language_model.model.embed_tokens.",
}  # fmt: skip


def tree_bytes(params) -> int:
    """Bytes of all arrays of a tree, packed leaves as they are stored."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


def bits_per_weight(params: AndesVL, config: AndesVLConfig) -> tuple[float, float]:
    """(body, all): bits per decoder-matrix weight and per parameter of the whole model, as held in memory."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    body = sum(tree_bytes(leaf) for path, leaf in flat if re.fullmatch(DECODER_MATRICES, path_name(path)))
    return 8 * body / _body_weights(config.text), 8 * tree_bytes(params) / count(describe(config))


def _body_weights(text: TextConfig) -> int:
    wide, narrow = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    return text.num_layers * text.hidden_size * (2 * wide + 2 * narrow + 3 * text.intermediate_size)


def kv_bytes_per_token(text: TextConfig, dtype: str) -> int:
    """Keys and values of one token in every layer."""
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * jnp.dtype(dtype).itemsize


def describe_checkpoint(
    model: str,
    sizes: Sequence[tuple[int, int]] = (),
    pictures: Sequence[str] = (),
    max_size: int | None = None,
    image_preset: str | None = None,
) -> dict[str, Any]:
    """What `andesvl info` prints, read from configurations and headers: no tensor is loaded and no picture decoded.

    Args:
      model: a checkpoint directory or a configuration name. sizes: (width, height) of pictures that may not exist.
      pictures: files of pictures. max_size: square root of the pixel budget of a picture, the directory's own if None.
      image_preset: "release" or "evaluation", the directory's own if None.
    Returns:
      parameters: {vision, projector, decoder, embedding (a part of the decoder), total}
      bytes_on_disk, bytes: of the weight files, and of their tensors per part; None without weight files
      bytes_in_memory: {float32, bfloat16}, of the parameters once loaded
      bpw: bits per parameter of each part; bpw_body: of the decoder's matrices; bpw_all: bytes on disk over all parameters
      kv_bytes_per_token (in the stored type), kv_bytes_per_1000_tokens: {float32, bfloat16}
      pictures: [{picture, size, canvas, visual_tokens, kv_bytes}], sizes as [width, height] in pixels
    Raises:
      UserError: an unknown name, a damaged file, or a picture that cannot be processed.
    """
    directory = shipped_directory(model) or Path(model)
    raw_processor: dict[str, Any] = {}
    tensors: dict[str, int] | None = None
    on_disk: int | None = None
    if directory.is_dir():
        raw = read_json(directory / "config.json")
        config, dtype = from_hf(raw, str(directory / "config.json")), raw.get("torch_dtype", "float32")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"{directory / 'config.json'}: torch_dtype is {dtype!r}, expected float32, bfloat16 or float16.")
        if (directory / "preprocessor_config.json").exists():
            raw_processor = read_json(directory / "preprocessor_config.json")
        if any(directory.glob("*.safetensors*")) or any(directory.glob("pytorch_model*")):
            stored, *_ = stored_tensors(directory)
            tensors = {name: tensor.span for name, tensor in stored.items()}
            on_disk = sum(file.stat().st_size for file in {tensor.file for tensor in stored.values()})
    elif model in CONFIGS:
        config, dtype = CONFIGS[model], "bfloat16"
    else:
        raise UserError(f"{model}: neither a checkpoint directory nor a configuration, expected one of {', '.join(CONFIGS)}.")
    parameters = _parameters(config)
    by_part = None if tensors is None else {part: _part_bytes(tensors, prefix) for part, prefix in PARTS.items()}
    if by_part is not None:
        by_part["total"] = sum(tensors.values())
    source = str(directory / "preprocessor_config.json")
    processor = ImageProcessor.from_hf(raw_processor, config.vision, max_size=max_size, source=source, preset=image_preset)
    named = [(f"{width}x{height}", (width, height)) for width, height in sizes]
    named += [(str(picture), image_size(picture)) for picture in pictures]
    per_token = {name: kv_bytes_per_token(config.text, name) for name in ("float32", "bfloat16")}
    return {
        "parameters": parameters,
        "bytes_on_disk": on_disk,
        "bytes": by_part,
        "bytes_in_memory": {name: parameters["total"] * jnp.dtype(name).itemsize for name in per_token},
        "bpw": None if by_part is None else {part: round(8 * n / parameters[part], 3) for part, n in by_part.items()},
        "bpw_body": None if tensors is None else round(8 * _body_bytes(tensors, config) / _body_weights(config.text), 3),
        "bpw_all": None if on_disk is None else round(8 * on_disk / parameters["total"], 3),
        "kv_bytes_per_token": kv_bytes_per_token(config.text, dtype),
        "kv_bytes_per_1000_tokens": {name: 1000 * n for name, n in per_token.items()},
        "pictures": [_picture(name, size, processor, kv_bytes_per_token(config.text, dtype)) for name, size in named],
    }


def _parameters(config: AndesVLConfig) -> dict[str, int]:
    parts = describe(config)
    counts = {part: count(getattr(parts, part)) for part in ("vision", "projector", "decoder")}
    return counts | {"embedding": count(parts.decoder.embedding), "total": sum(counts.values())}


def _part_bytes(tensors: dict[str, int], prefix: str) -> int:
    return sum(size for name, size in tensors.items() if name.startswith(prefix))


def _body_bytes(tensors: dict[str, int], config: AndesVLConfig) -> int:
    names = {name for entry in entries(config) if re.fullmatch(DECODER_MATRICES, entry.path) for name in entry.shapes()}
    return sum(size for name, size in tensors.items() if re.sub(r"\.weight_\w+$", ".weight", name) in names)


def _picture(name: str, size: tuple[int, int], processor: ImageProcessor, kv_bytes: int) -> dict[str, Any]:
    canvas, tokens = plan_size(*size, processor).canvas, processor.visual_tokens(*size)
    return {
        "picture": name, "size": list(size), "canvas": list(canvas), "visual_tokens": tokens, "kv_bytes": tokens * kv_bytes,
    }  # fmt: skip
