"""PyTorch weight files (`pytorch_model*.bin`) by tensor, without unpickling: nothing a file says is looked up or called.

Such a file is a zip of stored entries: `<root>/data/<key>` holds the bytes of one storage, `<root>/data.pkl` a pickle stream
that says which tensor is which part of which storage. The stream is read opcode by opcode into plain values; the only names
it may use are OrderedDict, two functions that rebuild tensors and the storage types, and these only build the records below
(layout: torch.serialization `_save`, torch._utils `_rebuild_tensor_v2`).
"""

import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from andesvl_jax.checkpoints.json_file import MAX_JSON_BYTES
from andesvl_jax.checkpoints.stored import Stored, item_bytes
from andesvl_jax.errors import UserError

STORAGES = {
    "torch DoubleStorage": "F64", "torch FloatStorage": "F32", "torch HalfStorage": "F16", "torch BFloat16Storage": "BF16",
    "torch LongStorage": "I64", "torch IntStorage": "I32", "torch ShortStorage": "I16", "torch CharStorage": "I8",
    "torch ByteStorage": "U8", "torch BoolStorage": "BOOL",
}  # fmt: skip
TENSOR, PARAMETER, ORDERED = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"
LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # how torch.save began before version 1.6
_MARK = object()


@dataclass(frozen=True)
class _Name:
    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(Exception):
    """Something that is no part of a file of tensors; the text says what."""


def list_tensors(file: Path) -> dict[str, Stored]:
    """Name -> where it lies. Raises UserError for anything but a dict of tensors whose storages are wholly in the file."""
    try:
        with file.open("rb") as handle:
            start = handle.read(len(LEGACY))
        if start == LEGACY:
            raise UserError(
                f"{file}: written in the format of PyTorch before 1.6, which is a pickle; convert it where PyTorch is "
                "installed: torch.save(torch.load(FILE, weights_only=True), FILE)."
            )
        with zipfile.ZipFile(file) as archive:
            entries, root = _entries(archive)
            tensors = _read_index(archive.read(entries[f"{root}/data.pkl"]))
        with file.open("rb") as handle:
            size, places = file.stat().st_size, {}
            for key in {t.storage.key for t in tensors.values()}:
                places[key] = _place(handle, entries.get(f"{root}/data/{key}"), key, size)
        return {name: _stored(file, name, tensor, *places[tensor.storage.key]) for name, tensor in tensors.items()}
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}), expected a complete checkpoint.") from error
    except (_Refused, zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not a readable file of PyTorch tensors ({error}); expected a complete checkpoint.") from error


def _entries(archive: zipfile.ZipFile) -> tuple[dict[str, zipfile.ZipInfo], str]:
    """The entries by name, and the folder that all of them are in."""
    entries = {info.filename: info for info in archive.infolist()}
    if len(entries) < len(archive.infolist()):
        raise _Refused("it has two entries of one name")
    for info in entries.values():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise _Refused("an entry is compressed or encrypted, torch.save stores them plainly")
    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise _Refused(f"it has {len(roots)} indices named data.pkl, expected 1")
    index, order = entries[f"{roots[0]}/data.pkl"], entries.get(f"{roots[0]}/byteorder")
    if index.file_size > MAX_JSON_BYTES:
        raise _Refused(f"its index has {index.file_size} bytes, expected at most {MAX_JSON_BYTES}")
    if order is not None and (order.file_size != 6 or archive.read(order) != b"little"):
        raise _Refused("its byte order is not little")
    return entries, roots[0]


def _place(handle, info: zipfile.ZipInfo | None, key: str, size: int) -> tuple[int, int]:
    """(first byte, bytes) of a storage. The length of an entry's own header is known only there."""
    if info is None:
        raise _Refused(f"the storage {key[:50]!r} is missing")
    handle.seek(info.header_offset)
    header = handle.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise _Refused(f"the storage {key[:50]!r} has no entry where the archive says")
    first = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if first + info.file_size > size:
        raise _Refused(f"the storage {key[:50]!r} reaches beyond the end of the file")
    return first, info.file_size


def _stored(file: Path, name: str, tensor: _Tensor, first: int, size: int) -> Stored:
    width = item_bytes(tensor.storage.dtype)
    elements = 0 if 0 in tensor.shape else 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if (tensor.offset + elements) * width > size:
        raise _Refused(f"{name[:200]!r} reaches beyond its storage of {size} bytes")
    contiguous, step = [], 1
    for n in reversed(tensor.shape):
        contiguous.append(step)
        step *= n
    plain = tensor.strides == tuple(reversed(contiguous))
    strides = None if plain else tensor.strides
    return Stored(file, tensor.storage.dtype, tensor.shape, first + tensor.offset * width, elements * width, strides)


def _read_index(data: bytes) -> dict[str, _Tensor]:
    """The pickle stream as names and tensors. Raises _Refused for any other value and any other opcode."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop(kind: type | tuple[type, ...] = object) -> Any:
        if not stack or stack[-1] is _MARK or not isinstance(stack[-1], kind):
            raise _Refused("its index is damaged")
        return stack.pop()

    def pop_to_mark() -> list[Any]:
        items = []
        while stack and stack[-1] is not _MARK:
            items.append(stack.pop())
        if not stack:
            raise _Refused("its index is damaged")
        stack.pop()
        return items[::-1]

    def set_items(items: list[Any]) -> None:
        if len(items) % 2 or not stack or not isinstance(stack[-1], dict):
            raise _Refused("its index is damaged")
        for name, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(name, str):
                raise _Refused(f"a {type(name).__name__} stands where the name of a tensor belongs")
            if name in stack[-1]:
                raise _Refused(f"{name[:200]!r} is there twice")
            stack[-1][name] = value

    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" if argument == 2:
                pass
            case "MARK":
                stack.append(_MARK)
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop() for _ in range(int(opcode.name[-1])))[::-1])
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = pop()
                stack.append(memo[argument])
            case "BINGET" | "LONG_BINGET" if argument in memo:
                stack.append(memo[argument])
            case "GLOBAL" if argument in (TENSOR, PARAMETER, ORDERED) or argument in STORAGES:
                stack.append(_Name(argument))
            case "GLOBAL":
                raise _Refused(f"it asks for {argument[:100]!r}, expected tensors only")
            case "BINPERSID":
                stack.append(_storage(pop(tuple)))
            case "REDUCE":
                arguments = pop(tuple)
                stack.append(_build(pop(_Name).name, arguments))
            case "SETITEM":
                value, name = pop(), pop()
                set_items([name, value])
            case "SETITEMS":
                set_items(pop_to_mark())
            case "BUILD":  # attributes of an OrderedDict (`_metadata`): versions of modules, of no use here
                pop(dict)
                stack.append(pop(dict))
            case "STOP":
                break
            case _:
                raise _Refused(f"its index uses the pickle opcode {opcode.name}, expected those of a dict of tensors")
    if not stack or not isinstance(stack[-1], dict):
        raise _Refused("it holds no dict of tensors")
    tensors = stack.pop()
    odd = next(((name, value) for name, value in tensors.items() if not isinstance(value, _Tensor)), None)
    if odd is not None:
        raise _Refused(f"{odd[0][:200]!r} is a {type(odd[1]).__name__}, expected tensors only")
    return tensors


def _build(name: str, arguments: tuple[Any, ...]) -> Any:
    """What REDUCE makes of a permitted name."""
    if name == ORDERED and not arguments:
        return {}
    if name == PARAMETER and len(arguments) == 3 and isinstance(arguments[0], _Tensor):
        return arguments[0]
    if name == TENSOR and len(arguments) in (6, 7) and isinstance(arguments[0], _Storage):
        storage, offset, shape, strides = arguments[:4]
        numbers = (offset, *shape, *strides) if isinstance(shape, tuple) and isinstance(strides, tuple) else (None,)
        if all(type(n) is int and 0 <= n < 2**63 for n in numbers) and len(shape) == len(strides) <= 8:
            return _Tensor(storage, offset, shape, strides)
    raise _Refused(f"{name} is called in a way that torch.save does not")


def _storage(identity: tuple[Any, ...]) -> _Storage:
    kind, name, key, _, _ = identity if len(identity) == 5 else (None,) * 5
    if kind != "storage" or not isinstance(name, _Name) or name.name not in STORAGES or type(key) is not str:
        raise _Refused("a storage is described in a way that torch.save does not")
    return _Storage(STORAGES[name.name], key)
