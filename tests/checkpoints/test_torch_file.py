"""PyTorch weight files: tensors come out as PyTorch has them, and whatever else a file says is refused without being run."""

import importlib.util
import io
import os
import pickle
import pickletools
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from directories import CONFIGS, assert_equal_params, bundle_of, refused
from safetensors.numpy import load_file

import andesvl_jax as avl
from andesvl_jax.checkpoints.json_file import write_json
from andesvl_jax.checkpoints.stored import FLOATS
from andesvl_jax.checkpoints.torch_file import LEGACY, STORAGES, list_tensors

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "torch_file"
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra `peers`: torch")


@pytest.fixture
def save_torch(monkeypatch):
    """torch.save for NumPy arrays: the same zip and the same names in the stream, without PyTorch."""

    def module(name: str, **members):
        found = types.ModuleType(name)
        for key, value in members.items():
            value.__module__, value.__qualname__, value.__name__ = name, key, key
            setattr(found, key, value)
        monkeypatch.setitem(sys.modules, name, found)

    module("torch._utils", _rebuild_tensor_v2=lambda: None)
    storages = {dtype: type("Storage", (), {}) for dtype in STORAGES.values()}
    module("torch", **{name.split()[1]: storages[dtype] for name, dtype in STORAGES.items()})
    rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
    names = {dtype: name for name, dtype in FLOATS.items()} | {np.dtype(np.int64): "I64"}

    class Tensor:
        def __init__(self, key: str, array: np.ndarray):
            self.key, self.array = key, array

        def __reduce__(self):
            strides = tuple(s // self.array.itemsize for s in self.array.strides)
            return rebuild, (Storage(self.key, self.array), 0, self.array.shape, strides, False, OrderedDict())

    class Storage:
        def __init__(self, key: str, array: np.ndarray):
            self.identity = ("storage", storages[names[array.dtype]], key, "cpu", array.size)

    class Pickler(pickle.Pickler):
        def persistent_id(self, x):
            return x.identity if isinstance(x, Storage) else None

    def save(tensors: dict, path: Path, compression=zipfile.ZIP_STORED, change=lambda stream: stream, entries=None) -> None:
        stream = io.BytesIO()
        wrapped = {n: Tensor(str(i), x) if isinstance(x, np.ndarray) else x for i, (n, x) in enumerate(tensors.items())}
        Pickler(stream, 2).dump(wrapped)
        files = {"data.pkl": change(stream.getvalue()), "byteorder": b"little", "version": b"3\n"}
        files |= {f"data/{v.key}": v.array.tobytes() for v in wrapped.values() if isinstance(v, Tensor)}
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in (files | (entries or {})).items():
                if data is not None:
                    archive.writestr(f"archive/{name}", data)

    return save


def as_torch_files(model: Path, save, shards: int = 1) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    if shards == 1:
        return save(tensors, model / "pytorch_model.bin")
    files = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save({n: t for n, t in tensors.items() if files[n] == file}, model / file)
    write_json(model / "pytorch_model.bin.index.json", {"weight_map": files})


@pytest.fixture
def model(tmp_path) -> Path:
    avl.save(bundle_of(CONFIGS["siglip2"]), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_in_pytorch_files_is_the_same_model(shards, model, save_torch):
    as_torch_files(model, save_torch, shards)
    assert_equal_params(avl.load(model).params, bundle_of(CONFIGS["siglip2"]).params)


def test_a_file_that_pytorch_wrote():
    """golden/torch_file was written by torch 2.13: a state dict with metadata, a Parameter, views, a tied tensor."""
    found, expected = list_tensors(GOLDEN / "pytorch_model.bin"), np.load(GOLDEN / "expected.npz")
    assert set(found) == set(expected)
    for name, tensor in found.items():
        view = tensor.view()
        assert not view.flags.writeable
        np.testing.assert_array_equal(view.astype(np.float32), expected[name], name)
    assert found["transposed"].strides == (1, 4) and found["row"].offset > found["transposed"].offset
    assert found["tied"].offset == found["weight"].offset
    assert {t.dtype for t in found.values()} == {"F64", "F32", "F16", "BF16"}


@needs_torch
def test_files_of_the_installed_pytorch(tmp_path):
    import torch

    x = torch.randn(6, 8)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        y = x.to(dtype)
        tensors = {"a": y, "b": y[2:, ::2], "c": y.T, "d": torch.nn.Parameter(y[3]), "e": y[0].expand(5, 8)}
        torch.save(OrderedDict(tensors), tmp_path / "x.bin")
        found = list_tensors(tmp_path / "x.bin")
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(found[name].view().astype(np.float64), tensor.detach().double().numpy(), name)
    torch.save(tensors, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(avl.UserError, match="before 1.6.*torch.save"):
        list_tensors(tmp_path / "x.bin")


class Harmful:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


OTHER_NAMES = ["os system", "builtins eval", "torch._utils _rebuild_tensor_v3", "torch load", "numpy.core.multiarray scalar"]


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_name_that_is_no_tensor_is_refused(name, model, save_torch):
    stream = b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n(tR."
    save_torch({}, model / "pytorch_model.bin", change=lambda _: stream)
    (model / "model.safetensors").unlink()
    assert f"asks for '{name}', expected tensors only" in refused(model)


def test_nothing_in_a_file_is_called(model, save_torch, tmp_path):
    (model / "model.safetensors").unlink()
    save_torch({"a": Harmful(tmp_path / "made")}, model / "pytorch_model.bin")
    assert "mkdir" in refused(model)
    assert not (tmp_path / "made").exists()


def entries(**changes):
    return {"entries": {name.replace("__", "/"): data for name, data in changes.items()}}


X = np.arange(12, dtype=np.float32).reshape(3, 4)
PICKLED_LOOP = b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."  # a dict that holds itself
DAMAGED = {
    "no zip": (None, "not a readable file of PyTorch tensors"),
    "the old format": (LEGACY + b"...", "before 1.6"),
    "compressed": ({"compression": zipfile.ZIP_DEFLATED}, "compressed"),
    "a missing storage": (entries(data__0=None), "storage '0' is missing"),
    "a short storage": (entries(data__0=b"\0" * 47), "beyond its storage of 47 bytes"),
    "no index": (entries(**{"data.pkl": None}), "0 indices"),
    "big-endian": (entries(byteorder=b"big"), "byte order"),
    "a huge index": (entries(**{"data.pkl": b"\0" * (17 << 20)}), "expected at most"),
    "an empty index": ({"change": lambda s: b""}, "pickle exhausted"),
    "half an index": ({"change": lambda s: s[: len(s) // 2]}, "not a readable file"),
    "an index without an end": ({"change": lambda s: s[:-1]}, "pickle exhausted"),
    "a list": ({"change": lambda s: b"\x80\x02]."}, "EMPTY_LIST"),
    "another protocol": ({"change": lambda s: b"\x80\x04}."}, "PROTO"),
    "no tensors": ({"change": lambda s: b"\x80\x02)."}, "no dict of tensors"),
    "a number": ({"change": lambda s: b"\x80\x02}X\x01\x00\x00\x00aK\x01s."}, "'a' is a int"),
    "a name twice": ({"change": lambda s: b"\x80\x02}X\x01\x00\x00\x00aK\x01sX\x01\x00\x00\x00aK\x01s."}, "'a' is there twice"),
    "a dict in itself": ({"change": lambda s: PICKLED_LOOP}, "'a' is a dict"),
    "an empty stack": ({"change": lambda s: b"\x80\x02R."}, "damaged"),
    "a memo that was never written": ({"change": lambda s: b"\x80\x02h\x07."}, "BINGET"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_in_one_sentence(damage, model, save_torch):
    how, message = DAMAGED[damage]
    (model / "model.safetensors").unlink()
    file = model / "pytorch_model.bin"
    if isinstance(how, dict):
        save_torch({"x": X}, file, **how)
    else:
        file.write_bytes(how or b"hello " * 99)
    found = refused(model)
    assert found.startswith(str(file)) and message in found


@pytest.mark.parametrize("field", ["offset", "rows", "stride"])
@pytest.mark.parametrize("value", [13, 2**31 - 1, -1])
def test_a_tensor_that_leaves_its_storage_is_refused(field, value, tmp_path, save_torch):
    """A shape of 2^31 rows is refused by arithmetic, before anything of that size is made."""
    number = b"J" + value.to_bytes(4, "little", signed=True)
    old = {"offset": (b"Q", b"K\x00"), "rows": (b"K\x00", b"K\x03K\x04"), "stride": (b"\x86", b"K\x04K\x01")}[field]

    def change(stream: bytes) -> bytes:
        at = stream.index(old[0] + old[1]) if field != "stride" else stream.index(old[1], stream.index(b"K\x03K\x04"))
        at += len(old[0]) if field != "stride" else 0
        return stream[:at] + number + stream[at + 2 :]

    save_torch({"x": X}, tmp_path / "x.bin", change=change)
    with pytest.raises(avl.UserError, match="beyond its storage|in a way that torch.save does not"):
        list_tensors(tmp_path / "x.bin")


def test_every_truncation_and_any_flipped_byte_of_the_index_is_a_sentence_or_harmless(tmp_path, save_torch):
    """Whatever byte of the index is changed, the reader either refuses or reads inside the file."""
    save_torch({"x": X, "y": X.astype(np.float16)}, tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "x.bin") as archive:
        stream = archive.read("archive/data.pkl")
    list(pickletools.genops(stream))
    rng, size = np.random.default_rng(0), (tmp_path / "x.bin").stat().st_size
    outcomes = {"refused": 0, "read": 0}
    for at in range(len(stream)):
        broken = stream[:at] + bytes([int(rng.integers(256))]) + stream[at + 1 :]
        save_torch({"x": X, "y": X.astype(np.float16)}, tmp_path / "y.bin", change=lambda _, b=broken: b)
        try:
            for tensor in list_tensors(tmp_path / "y.bin").values():
                assert 0 <= tensor.offset and tensor.offset + tensor.span <= size
                if tensor.dtype in FLOATS and tensor.span:
                    float(tensor.view().astype(np.float64).sum())
            outcomes["read"] += 1
        except avl.UserError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > len(stream) // 2
