"""Checkpoint directories in the HF layout: config.json, safetensors, tokenizer and processor files, in and out."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from andesvl_jax.checkpoints.bundle import RELEASED_GENERATION, Bundle
from andesvl_jax.checkpoints.names import TIED_HEAD, entries
from andesvl_jax.config import AndesVLConfig, from_hf, to_hf
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.tokenizer import Tokenizer
from andesvl_jax.model.andesvl import AndesVL, describe
from andesvl_jax.weights import is_leaf, is_param, path_name

MAX_JSON_BYTES = 16 << 20  # a config is kilobytes; the index of a 4B checkpoint is under one megabyte


def load(
    path: str | os.PathLike, dtype: str = "float32", max_size: int | None = None, image_token_id: int | None = None,
    image_preset: str | None = None,
) -> Bundle:  # fmt: skip
    """Reads a checkpoint directory in the HF layout.

    Args:
      dtype: type of weights and compute, "float32" or "bfloat16". max_size: square root of the pixel budget of a picture,
        733 if None. image_token_id: for a directory without a tokenizer whose config.json does not give it.
        image_preset: "release" or "evaluation", see `inputs.image.PRESETS`; None: as the directory says, else "release".
    Raises:
      UserError: a missing or unreadable file, an unknown key, a tensor that is missing, unknown or of the wrong shape.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory, expected a checkpoint with config.json and model.safetensors.")
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
    return Bundle(config, read_params(path, config), tokenizer, processor, generation_config)


def save(bundle: Bundle, path: str | os.PathLike) -> None:
    """Writes the directory that `load` reads. It appears whole or not at all; what stood there before is replaced last.

    Raises:
      UserError: the weights hold adapters or packed leaves (merge or expand them first), or the disk refuses.
    """
    path = Path(path)
    tensors = params_to_hf(bundle.params, bundle.config)
    staging = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
        _write_json(staging / "config.json", to_hf(bundle.config))
        _write_json(staging / "preprocessor_config.json", bundle.image_processor.to_hf())
        _write_json(staging / "generation_config.json", bundle.generation_config)
        if bundle.tokenizer is not None:
            bundle.tokenizer.save(staging)
        staging.chmod(0o755)
        _swap(staging, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: could not be written ({error}); what was saved there before is untouched.") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _swap(staging: Path, path: Path) -> None:
    """Directories cannot be replaced in one step, so the old one is set aside until the new one stands."""
    old = path.with_name(f".{path.name}.old")
    if path.exists():  # else `old` may be all that an interrupted save left
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    try:
        staging.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def hf_shapes(config: AndesVLConfig) -> dict[str, tuple[int, ...]]:
    """HF tensor name -> shape for a configuration, without allocating; a tied head is listed as releases may store it."""
    shapes = {name: shape for entry in entries(config) for name, shape in entry.shapes().items()}
    if config.text.tie_word_embeddings:
        shapes[TIED_HEAD] = shapes["language_model.model.embed_tokens.weight"]
    return shapes


def params_to_hf(params: AndesVL, config: AndesVLConfig) -> dict[str, np.ndarray]:
    """Dense parameters -> HF tensors by name. Raises UserError for leaves that are not plain arrays."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    leaves = {path_name(p): leaf for p, leaf in flat}
    odd = next((name for name, leaf in leaves.items() if is_leaf(leaf)), None)
    if odd is not None:
        raise UserError(f"weights {odd}: a {type(leaves[odd]).__name__} leaf has no place in the HF layout; make it dense first.")
    return {name: x for entry in entries(config) for name, x in entry.to_hf(np.asarray(leaves[entry.path])).items()}


def read_params(path: Path, config: AndesVLConfig) -> AndesVL:
    """The tensors of a directory as the parameter tree in config.param_dtype, checked by name and shape before any is read."""
    files = _tensor_files(path)
    handles: dict[str, Any] = {}
    found: dict[str, str] = {}
    for file in files:
        try:
            handle = safe_open(file, framework="numpy")
            found |= dict.fromkeys(handle.keys(), str(file))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a readable safetensors file ({error}); expected a complete checkpoint.") from error
        handles[str(file)] = handle
    _check_tensors(path, config, found, handles)

    def read(name: str) -> np.ndarray:
        return handles[found[name]].get_tensor(name)

    leaves = {entry.path: entry.from_hf(read) for entry in entries(config)}
    _check_tied_head(path, config, found, read)
    flat, tree = jax.tree_util.tree_flatten_with_path(describe(config), is_leaf=is_param)
    return jax.tree.unflatten(tree, [jnp.asarray(leaves[path_name(p)], config.param_dtype) for p, _ in flat])


def _tensor_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        single = path / "model.safetensors"
        if not single.exists():
            raise UserError(f"{path}: found neither model.safetensors nor model.safetensors.index.json, expected one of them.")
        return [single]
    weight_map = read_json(index).get("weight_map")
    plain = lambda v: isinstance(v, str) and Path(v).name == v and v.endswith(".safetensors")  # noqa: E731
    if not isinstance(weight_map, dict) or not all(map(plain, weight_map.values())):
        raise UserError(f"{index}: weight_map is missing or leaves the directory, expected names of .safetensors files in it.")
    return [path / name for name in sorted(set(weight_map.values()))]


def _check_tensors(path: Path, config: AndesVLConfig, found: dict[str, str], handles: dict[str, Any]) -> None:
    expected = hf_shapes(config)
    problems = []
    missing = sorted(set(expected) - set(found) - ({TIED_HEAD} if config.text.tie_word_embeddings else set()))
    unknown = sorted(set(found) - set(expected))
    if missing:
        problems.append(f"{len(missing)} missing ({', '.join(missing)})")
    if unknown:
        problems.append(f"{len(unknown)} unknown ({', '.join(unknown)})")
    for name in sorted(set(found) & set(expected)):
        shape = tuple(handles[found[name]].get_slice(name).get_shape())
        if shape != expected[name]:
            problems.append(f"{name} has shape {list(shape)}, expected {list(expected[name])}")
    if problems:
        raise UserError(f"{path}: the tensors do not fit config.json: {'; '.join(problems)}.")


def _check_tied_head(path: Path, config: AndesVLConfig, found: dict[str, str], read) -> None:
    if config.text.tie_word_embeddings and TIED_HEAD in found:
        if not np.array_equal(read(TIED_HEAD), read("language_model.model.embed_tokens.weight")):
            raise UserError(f"{path}: {TIED_HEAD} differs from the embedding, expected equal under tie_word_embeddings.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises UserError when it is missing, too large or not an object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}.")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a JSON file.") from error
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds a {type(raw).__name__}, expected a JSON object.")
    return raw


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
