"""Safetensors files by tensor: the header is checked before anything is read, and files are written one tensor at a time.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data
(https://huggingface.co/docs/safetensors, "Format").
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from andesvl_jax.checkpoints.json_file import MAX_JSON_BYTES, parse_json, write_json
from andesvl_jax.checkpoints.stored import FLOATS, INTEGERS, Stored, item_bytes
from andesvl_jax.errors import UserError

SINGLE = "model.safetensors"
Spec = tuple[np.dtype, tuple[int, ...]]


def list_tensors(file: Path) -> dict[str, Stored]:
    """Name -> where it lies. Raises UserError unless the header accounts for every byte of the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_JSON_BYTES):
                raise _damaged(file, f"a header of {length} bytes in a file of {size}")
            header = parse_json(handle.read(length), str(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}), expected a complete checkpoint.") from error
    header.pop("__metadata__", None)
    found = {name: _stored(file, name, entry, 8 + length, size) for name, entry in header.items()}
    end = 8 + length
    for tensor in sorted(found.values(), key=lambda t: (t.offset, t.span)):
        if tensor.offset != end:
            raise _damaged(file, f"tensors that overlap or leave a gap at byte {end}")
        end += tensor.span
    if end != size:
        raise _damaged(file, f"{size} bytes where its header describes {end}")
    return found


def _stored(file: Path, name: str, entry: Any, start: int, size: int) -> Stored:
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        plain = (
            isinstance(dtype, str) and len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, first, last))
        )
    except (TypeError, KeyError, ValueError):
        plain = False
    if not plain or not first <= last <= size - start:
        raise _damaged(file, f"the tensor {name[:200]!r} outside of the file or without dtype, shape and data_offsets")
    width = item_bytes(dtype)
    if width is not None and math.prod(shape) * width != last - first:
        raise _damaged(file, f"{last - first} bytes for {name[:200]!r}, {dtype} of shape {list(shape)}")
    return Stored(file, dtype[:20], shape, start + first, last - first)


def _damaged(file: Path, found: str) -> UserError:
    return UserError(f"{file}: not a readable safetensors file (found {found}); expected a complete checkpoint.")


def write_tensors(directory: Path, specs: Mapping[str, Spec], tensors: Iterable[np.ndarray], max_shard_bytes: int) -> None:
    """Writes model.safetensors, or shards of at most `max_shard_bytes` (one tensor at least) with their index.

    Args:
      specs: name -> (dtype, shape). tensors: their values in the order of `specs`, taken one at a time.
    """
    shards, sizes = [[]], [0]
    for name, (dtype, shape) in specs.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and sizes[-1] + size > max_shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    stream = iter(tensors)
    if len(shards) == 1:
        return _write_file(directory / SINGLE, specs, stream)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        _write_file(directory / file, {name: specs[name] for name in names}, stream)
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    write_json(directory / f"{SINGLE}.index.json", {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def _write_file(path: Path, specs: Mapping[str, Spec], tensors: Iterator[np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = {dtype: name for name, dtype in (FLOATS | INTEGERS).items()}
    end = 0
    for name, (dtype, shape) in specs.items():
        first, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)  # so that the data is aligned when the file is mapped
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), tensor in zip(specs.items(), tensors, strict=False):
            if (tensor.dtype, tensor.shape) != (dtype, shape):
                raise ValueError(f"{name} is {tensor.dtype}{tensor.shape}, announced as {dtype}{shape}")
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
