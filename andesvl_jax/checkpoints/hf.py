"""Checkpoint directories in the HF layout: config.json, safetensors, tokenizer and processor files, in and out."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from andesvl_jax.checkpoints.bundle import RELEASED_GENERATION, Bundle
from andesvl_jax.checkpoints.json_file import read_json, write_json
from andesvl_jax.checkpoints.locate import local_directory
from andesvl_jax.checkpoints.names import Entry, entries
from andesvl_jax.checkpoints.packed import packed_specs, packed_to_hf, quantization_config, write_recipe
from andesvl_jax.checkpoints.peft import load_adapter
from andesvl_jax.checkpoints.reading import read_params
from andesvl_jax.checkpoints.safetensors_file import write_tensors
from andesvl_jax.checkpoints.staging import replacing
from andesvl_jax.config import AndesVLConfig, from_hf, to_hf
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.tokenizer import Tokenizer
from andesvl_jax.model.andesvl import AndesVL, for_decoding
from andesvl_jax.weights import Packed, Param, is_leaf, path_name

MAX_SHARD_BYTES = 5_000_000_000


def load(
    path: str | os.PathLike, dtype: str = "float32", max_size: int | None = None, image_token_id: int | None = None,
    revision: str | None = None, sharding: Callable[[Param], jax.sharding.Sharding] | None = None,
    image_preset: str | None = None, decode_only: bool = False, adapter: str | os.PathLike | None = None,
) -> Bundle:  # fmt: skip
    """Reads a checkpoint in the HF layout: safetensors or PyTorch files, single or in shards with their index.

    Args:
      path: a directory, a name that ships ("nano"), or a hub id such as "OPPOer/AndesVL-1B-Instruct", which is downloaded (at
        `revision`, if given).
      dtype: type of weights and compute, "float32" or "bfloat16"; stored weights are cast to it one by one.
      max_size: square root of the pixel budget of a picture, 733 if None. image_token_id: for a directory without a tokenizer
        whose config.json does not give it.
      sharding: places each array of the network, by its shape and axis names; every device reads its own part from disk.
      decode_only: lay the weights out for decoding at once, in half the memory on CPU; such a model cannot be trained or saved.
      adapter: a PEFT directory whose LoRA adapters are put over the weights, see `checkpoints.peft.load_adapter`.
      image_preset: "release" or "evaluation", see `inputs.image.PRESETS`; None: as the directory says, else "release".
    Raises:
      UserError: a missing or unreadable file, an unknown key, or tensors that are missing, unknown, there twice, or of wrong
        shape or type, all of them in one error.
    """
    path = local_directory(path, revision)
    config = from_hf(read_json(path / "config.json"), str(path / "config.json"), dtype=dtype, param_dtype=dtype)
    tokenizer = Tokenizer.load(path)
    if image_token_id is None:
        image_token_id = config.image_token_id if tokenizer is None else tokenizer.image_token_id
    config = config.replace(image_token_id=image_token_id)
    raw = read_json(path / "preprocessor_config.json")
    source = str(path / "preprocessor_config.json")
    processor = ImageProcessor.from_hf(raw, config.vision, max_size=max_size, source=source, preset=image_preset)
    generation = path / "generation_config.json"
    generation_config = read_json(generation) if generation.exists() else dict(RELEASED_GENERATION)
    params, recipe = read_params(path, config, sharding)
    if adapter is not None:
        params = load_adapter(params, config, adapter)
    if decode_only:
        params, config = for_decoding(params, config, donate=True)
    return Bundle(config, params, tokenizer, processor, generation_config, recipe)


def save(bundle: Bundle, path: str | os.PathLike, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes the directory that `load` reads. It appears whole or not at all; an earlier checkpoint there is replaced last.

    Weights beyond `max_shard_bytes` become shards with an index; in memory there is one tensor more than the bundle has.

    Raises:
      UserError: the weights hold adapters or simulated leaves (merge or pack them first), `path` holds something that is no
        checkpoint, or the disk refuses.
    """
    leaves = _leaves_on_disk(bundle.params, bundle.config)
    specs: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for entry, leaf in leaves.values():
        dense = {name: (np.dtype(leaf.dtype), shape) for name, shape in entry.shapes().items()} if not is_leaf(leaf) else {}
        specs |= dense or packed_specs(entry, leaf)
    pieces = (packed_to_hf(e, w) if is_leaf(w) else e.to_hf(np.asarray(w)) for e, w in leaves.values())
    tensors = (tensor for piece in pieces for _, tensor in piece)
    packed = any(is_leaf(leaf) for _, leaf in leaves.values())
    with replacing(Path(path), "checkpoint", ("config.json",)) as staging:
        write_tensors(staging, specs, tensors, max_shard_bytes)
        config = to_hf(bundle.config)
        if packed:
            config["quantization_config"] = quantization_config(leaves)
            write_recipe(staging, leaves)
        write_json(staging / "config.json", config)
        write_json(staging / "preprocessor_config.json", bundle.image_processor.to_hf())
        write_json(staging / "generation_config.json", bundle.generation_config)
        if bundle.tokenizer is not None:
            bundle.tokenizer.save(staging)


def _leaves_on_disk(params: AndesVL, config: AndesVLConfig) -> dict[str, tuple[Entry, Any]]:
    """Path -> (HF names, dense or packed leaf). Raises UserError for leaves of other kinds."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    leaves = {path_name(p): leaf for p, leaf in flat}
    odd = next((name for name, leaf in leaves.items() if is_leaf(leaf) and not isinstance(leaf, Packed)), None)
    if odd is not None:
        raise UserError(f"weights {odd}: a {type(leaves[odd]).__name__} leaf has no place in the HF layout; make it dense first.")
    return {entry.path: (entry, leaves[entry.path]) for entry in entries(config)}


def params_to_hf(params: AndesVL, config: AndesVLConfig) -> dict[str, np.ndarray]:
    """Dense parameters -> HF tensors by name. Raises UserError for leaves that are not plain arrays."""
    leaves = _plain_leaves(params)
    return {name: x for entry in entries(config) for name, x in entry.to_hf(np.asarray(leaves[entry.path]))}


def _plain_leaves(params: AndesVL) -> dict[str, jax.Array]:
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    leaves = {path_name(p): leaf for p, leaf in flat}
    odd = next((name for name, leaf in leaves.items() if is_leaf(leaf)), None)
    if odd is not None:
        raise UserError(f"weights {odd}: a {type(leaves[odd]).__name__} leaf has no place in the HF layout; make it dense first.")
    return leaves
