"""The tensors of a checkpoint directory as the parameter tree: found, checked all together, then read one at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from andesvl_jax.checkpoints import safetensors_file, torch_file
from andesvl_jax.checkpoints.json_file import read_json
from andesvl_jax.checkpoints.names import EMBEDDING, TIED_HEAD, Entry, entries
from andesvl_jax.checkpoints.packed import packed_specs, placed, read_packed, read_recipe, recipe_of_tensors
from andesvl_jax.checkpoints.stored import FLOATS, INTEGERS, Stored
from andesvl_jax.config import AndesVLConfig
from andesvl_jax.errors import UserError
from andesvl_jax.model.andesvl import AndesVL, describe
from andesvl_jax.weights import Packed, Param, Recipe, is_leaf, is_param, path_name

# (single file, reader of one file), best first
FORMATS = ((safetensors_file.SINGLE, safetensors_file.list_tensors), ("pytorch_model.bin", torch_file.list_tensors))
ALIGNMENT = 64  # bytes; at such addresses jax takes a NumPy array on the CPU as it is, without a copy


def read_params(
    path: Path, config: AndesVLConfig, sharding: Callable[[Param], jax.sharding.Sharding] | None = None
) -> tuple[AndesVL, Recipe | None]:
    """The tensors of a directory as the parameter tree, floats in config.param_dtype; and the recipe of packed weights.

    All names, shapes and types are checked before any tensor is read. Tensors are mapped from their files, cast and laid out
    block by block straight into their place, so memory holds the result and the pages of one tensor; each shard of
    `sharding(param)` reads its own part only.

    Raises:
      UserError: a file that is damaged, or tensors that are missing, unknown, there twice, or of wrong shape or type.
    """
    found, indexed, problems = stored_tensors(path)
    by_path = {entry.path: entry for entry in entries(config)}
    recipe = read_recipe(path) or recipe_of_tensors(found, {name: (e, e.param) for name, e in by_path.items()}, path)
    description = describe(config, recipe)
    flat, tree = jax.tree_util.tree_flatten_with_path(description, is_leaf=lambda x: is_param(x) or is_leaf(x))
    described = {path_name(p): leaf for p, leaf in flat}
    _check_tensors(path, config, found, indexed, problems, {name: (by_path[name], described[name]) for name in described})
    if config.text.tie_word_embeddings and TIED_HEAD in found:
        _check_tied_head(path, found[TIED_HEAD], found[EMBEDDING])
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(config.param_dtype))

    def read(name: str, leaf):
        if isinstance(leaf, Packed):
            return placed(read_packed(by_path[name], leaf, found, path), leaf, sharding)
        return _read_leaf(by_path[name], found, dtype, sharding)

    return tree.unflatten([read(name, leaf) for name, leaf in described.items()]), recipe


def _read_leaf(entry: Entry, found: dict[str, Stored], dtype: np.dtype, sharding) -> jax.Array:
    shape, parts = entry.param.shape, {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if bounds not in parts:  # replicas share what one of them has read
            parts[bounds] = _empty([stop - start for start, stop in bounds], dtype)
            entry.fill(parts[bounds], bounds, lambda name: found[name].view())
        return parts[bounds]

    if sharding is None:
        return jax.device_put(part((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding(entry.param), part, dtype=dtype)


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def stored_tensors(path: Path) -> tuple[dict[str, Stored], set[str], list[str]]:
    """What the headers of a directory's weight files tell.

    Returns:
      name -> tensor; the names that the index has and no file; what is there twice or in the wrong file, a phrase each.
    """
    files, list_file, index = _weight_files(path)
    found: dict[str, Stored] = {}
    problems: list[str] = []
    for file in files:
        for name, tensor in list_file(file).items():
            if name in found:
                problems.append(f"{name} is both in {found[name].file.name} and in {file.name}, expected once")
            elif index is not None and name in index and index[name] != file.name:
                problems.append(f"{name} is in {file.name}, expected in {index[name]} by the index")
            found.setdefault(name, tensor)
    return found, set(index or ()) - set(found), problems


def _check_tensors(
    path: Path, config: AndesVLConfig, found: dict[str, Stored], indexed: set[str], problems: list[str],
    leaves: dict[str, tuple[Entry, Any]],
) -> None:  # fmt: skip
    """Raises one UserError that names everything that does not fit the configuration and the recipe."""
    expected: dict[str, tuple[np.dtype | None, tuple[int, ...]]] = {}  # None: any float
    for entry, leaf in leaves.values():
        floats = {name: (None, shape) for name, shape in entry.shapes().items()}
        expected |= packed_specs(entry, leaf) if isinstance(leaf, Packed) else floats
    optional = set()
    if config.text.tie_word_embeddings and EMBEDDING in expected:
        expected[TIED_HEAD], optional = expected[EMBEDDING], {TIED_HEAD}
    missing = sorted(set(expected) - set(found) - optional)
    unknown = sorted(set(found) - set(expected))
    absent = sorted(indexed - set(missing))
    if missing:
        problems.append(f"{len(missing)} missing ({', '.join(missing)})")
    if unknown:
        problems.append(f"{len(unknown)} unknown ({', '.join(map(_printable, unknown))})")
    if absent:
        problems.append(f"{len(absent)} in the index and in no file ({', '.join(map(_printable, absent))})")
    for name in sorted(set(found) & set(expected)):
        dtype, shape = expected[name]
        if found[name].shape != shape:
            problems.append(f"{name} has shape {list(found[name].shape)}, expected {list(shape)}")
        if dtype is None or name.endswith("_scale"):
            if found[name].dtype not in FLOATS:
                problems.append(f"{name} has type {found[name].dtype}, expected one of {', '.join(FLOATS)}")
        elif INTEGERS.get(found[name].dtype) != dtype:
            problems.append(f"{name} has type {found[name].dtype}, expected {dtype}")
    if problems:
        raise UserError(f"{path}: the tensors do not fit config.json: {'; '.join(problems)}.")


def _printable(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _weight_files(path: Path) -> tuple[list[Path], Callable[[Path], dict[str, Stored]], dict[str, str] | None]:
    """The weight files, what reads one, and the index's map name -> file (None without an index)."""
    for single, list_file in FORMATS:
        index = path / f"{single}.index.json"
        if (path / single).exists() and index.exists():
            raise UserError(f"{path}: holds both {single} and {index.name}, expected one of them; remove the stale one.")
        if (path / single).exists():
            return [path / single], list_file, None
        if index.exists():
            weight_map = _read_index(index, Path(single).suffix)
            return [path / name for name in sorted(set(weight_map.values()))], list_file, weight_map
    names = ", ".join(name for single, _ in FORMATS for name in (single, f"{single}.index.json"))
    raise UserError(f"{path}: found no weights, expected one of {names}.")


def _read_index(index: Path, suffix: str) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    plain = lambda v: isinstance(v, str) and Path(v).name == v and v.endswith(suffix)  # noqa: E731
    if not isinstance(weight_map, dict) or not weight_map or not all(map(plain, weight_map.values())):
        raise UserError(f"{index}: weight_map is missing or leaves the directory, expected names of {suffix} files in it.")
    return weight_map


def _check_tied_head(path: Path, head: Stored, embedding: Stored) -> None:
    """Raises UserError unless both hold the same values; compared some rows at a time."""
    a, b, rows = head.view(), embedding.view(), 1024
    for i in range(0, len(a), rows):
        if not np.array_equal(a[i : i + rows].astype(np.float64), b[i : i + rows].astype(np.float64), equal_nan=True):
            raise UserError(f"{path}: {TIED_HEAD} differs from the embedding, expected equal under tie_word_embeddings.")
