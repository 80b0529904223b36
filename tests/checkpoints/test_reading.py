"""Reading and writing weights: every misfit in one error, one tensor in memory at a time, straight to shards, ids of the hub."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from directories import CONFIGS, assert_equal_params, bundle_of, change_json, refused, rewrite, split_into_shards
from safetensors.numpy import load_file, save_file
from tiny import tiny_config, xla_flags

import andesvl_jax as avl
from andesvl_jax.checkpoints.names import EMBEDDING, TIED_HEAD
from andesvl_jax.checkpoints.safetensors_file import list_tensors, write_tensors
from andesvl_jax.config import from_hf, to_hf

ROOT = Path(__file__).resolve().parents[2]
SHARD = "model-{:05d}-of-00003.safetensors"


def test_all_kinds_of_misfits_are_in_one_error(model):
    names = sorted(load_file(model / "model.safetensors"))
    lost, odd, whole, narrow = names[:4]
    split_into_shards(model)
    files = {file: load_file(model / file) for file in sorted(p.name for p in model.glob("*.safetensors"))}
    at = {name: file for file, tensors in files.items() for name in tensors}
    del files[at[lost]][lost]
    files[at[odd]][odd] = np.zeros((3, 1), np.float32)
    files[at[whole]][whole] = files[at[whole]][whole].astype(np.int32)
    files[SHARD.format(3)]["extra"] = np.zeros(2, np.float32)
    other = next(file for file in files if file != at[narrow])
    files[other][narrow] = files[at[narrow]][narrow]
    for file, tensors in files.items():
        save_file(tensors, model / file)
    message = refused(model)
    for part in (
        f"1 missing ({lost})",
        "1 unknown (extra)",
        f"{odd} has shape [3, 1], expected",
        f"{whole} has type I32, expected one of F64, F32, F16, BF16",
        f"{narrow} is both in",
    ):
        assert part in message, part


def test_a_tensor_in_another_shard_than_the_index_says_is_named(model):
    split_into_shards(model)
    index = model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    right = weight_map[EMBEDDING]
    wrong = next(file for file in sorted(set(weight_map.values())) if file != right)
    change_json(index, weight_map=weight_map | {EMBEDDING: wrong})
    assert f"{EMBEDDING} is in {right}, expected in {wrong} by the index" in refused(model)
    change_json(index, weight_map=weight_map | {"extra\n": wrong})
    assert "1 in the index and in no file ('extra\\n')" in refused(model)


def test_a_single_file_beside_an_index_is_ambiguous(model):
    whole = (model / "model.safetensors").read_bytes()
    split_into_shards(model)
    (model / "model.safetensors").write_bytes(whole)
    assert "holds both" in refused(model)


def test_safetensors_come_before_pytorch_files(model):
    (model / "pytorch_model.bin").write_bytes(b"not looked at")
    assert_equal_params(avl.load(model).params, bundle_of(CONFIGS["aimv2"]).params)


@pytest.mark.parametrize("stored", [np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_types_are_cast_to_the_one_asked_for(stored, dtype, model):
    rewrite(model, lambda t: t.update({name: x.astype(stored) for name, x in t.items()}))
    expected = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(stored).astype(dtype)), bundle_of(CONFIGS["aimv2"]).params)
    assert_equal_params(avl.load(model, dtype=dtype).params, expected)


def test_a_tied_head_of_another_type_is_compared_by_value(model):
    as_bf16 = lambda x: x.astype(ml_dtypes.bfloat16)  # noqa: E731
    rewrite(model, lambda t: t.update({EMBEDDING: as_bf16(t[EMBEDDING]), TIED_HEAD: as_bf16(t[EMBEDDING]).astype(np.float32)}))
    assert avl.load(model).params.decoder.head is None


HEADERS = {
    "a name twice": '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    "an overlap": '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "a gap": '{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    "bytes at the end": '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "outside": '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "a huge shape": '{"a":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,8]}}',
    "a negative shape": '{"a":{"dtype":"F32","shape":[-1,-2],"data_offsets":[0,8]}}',
    "no offsets": '{"a":{"dtype":"F32","shape":[2]}}',
    "a text for a tensor": '{"a":"F32"}',
    "a list": "[]",
}


@pytest.mark.parametrize("damage", HEADERS)
def test_a_header_that_does_not_describe_its_file_is_refused(damage, tmp_path):
    header = HEADERS[damage].encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(avl.UserError, match="x.safetensors"):
        list_tensors(tmp_path / "x.safetensors")


def test_a_header_longer_than_its_file_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(avl.UserError, match="a header of 4611686018427387904 bytes in a file of 10"):
        list_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["aimv2", "siglip2"])
def test_shards_of_a_save_read_back_bit_for_bit_here_and_with_the_safetensors_library(family, dtype, tmp_path):
    bundle = bundle_of(tiny_config(family, dtype=dtype, param_dtype=dtype))
    avl.save(bundle, tmp_path / "whole")
    avl.save(bundle, tmp_path / "parts", max_shard_bytes=5000)
    assert_equal_params(avl.load(tmp_path / "parts", dtype=dtype).params, bundle.params)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    found = {name: x for file in shards for name, x in load_file(tmp_path / "parts" / file).items()}
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in expected.values())
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(found[name], expected[name], name)
        size = (tmp_path / "parts" / index["weight_map"][name]).stat().st_size
        assert size < 5000 + 3000 or len([f for f in index["weight_map"].values() if f == index["weight_map"][name]]) == 1


def test_a_writer_that_is_given_something_else_than_announced_stops(tmp_path):
    specs = {"a": (np.dtype(np.float32), (2,))}
    with pytest.raises(ValueError, match="announced"):
        write_tensors(tmp_path, specs, iter([np.zeros(3, np.float32)]), 100)


@pytest.mark.parametrize("what", ["a file", "another directory"])
def test_only_an_earlier_checkpoint_is_replaced(what, tmp_path):
    path = tmp_path / "home"
    if what == "a file":
        path.write_text("letter")
    else:
        path.mkdir()
        (path / "letter.txt").write_text("letter")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(avl.UserError, match="home: exists and is no earlier checkpoint"):
        avl.save(bundle_of(CONFIGS["aimv2"]), path)
    assert sorted(tmp_path.rglob("*")) == before


def in_a_process(script: str, *arguments: str, **environment: str) -> dict:
    """The last line that the script prints, as JSON."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "checkpoints"), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths} | environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


MEMORY = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp
import andesvl_jax as avl
from full_size import peak_bytes

jnp.zeros(1).block_until_ready()  # the backend is there before memory is counted
before = peak_bytes()
bundle = avl.load(sys.argv[1])
loaded = peak_bytes()
avl.save(bundle, Path(sys.argv[1]).parent / "again")
total = sum(x.nbytes for x in jax.tree.leaves(bundle.params))
print(json.dumps({"total": total, "loaded": loaded - before, "saved": peak_bytes() - before}))
"""


DECODE_ONLY = """
import json, sys
import jax, jax.numpy as jnp
import andesvl_jax as avl
from full_size import peak_bytes

jnp.zeros(1).block_until_ready()
before = peak_bytes()
bundle = avl.load(sys.argv[1], decode_only=True)
jax.block_until_ready(bundle.decoding_params)
print(json.dumps({"total": sum(x.nbytes for x in jax.tree.leaves(bundle.params)), "peak": peak_bytes() - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_of_loading_and_saving_is_the_model_and_one_tensor(tmp_path, monkeypatch):
    """201 MB in float32 from bfloat16 files, tensors of at most 8 MB. A second copy of a stack would be 67 MB, the mapped
    files 100 MB; the allowance of 40 MB beside the largest tensor is for the allocator and the code that runs first."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from full_size import write_random

    text = {"hidden_size": 256, "intermediate_size": 8192, "num_layers": 8, "vocab_size": 512}
    write_random(tmp_path, tiny_config(text=text, param_dtype="bfloat16"))
    found = in_a_process(MEMORY, str(tmp_path))
    largest = 256 * 8192 * 4
    assert found["total"] > 200e6
    assert found["total"] < found["loaded"] < found["total"] + largest + 40e6
    alone = in_a_process(DECODE_ONLY, str(tmp_path))
    assert alone["peak"] < alone["total"] + 8 * largest + 44e6  # one stack of layers is there twice while it is laid out anew
    assert found["saved"] < found["total"] + 2 * largest + 48e6


SHARDED = """
import json, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import andesvl_jax as avl

mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))
ways = {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor", "embed": "fsdp"}

def sharding(param):
    return NamedSharding(mesh, PartitionSpec(*(ways.get(axis) for axis in param.axes)))

whole, parts = avl.load(sys.argv[1]).params, avl.load(sys.argv[1], sharding=sharding).params
split = 0
for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    assert a.dtype == b.dtype and len(b.addressable_shards) == 8
    for shard in b.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(a)[shard.index])
    split += b.addressable_shards[0].data.size < b.size
assert parts.decoder.layers.gate.addressable_shards[0].data.shape == (2, 12, 8)
print(json.dumps({"split": split, "leaves": len(jax.tree.leaves(whole))}))
"""


@pytest.mark.parametrize("family", ["aimv2", "siglip2"])
def test_each_device_gets_its_part(family, tmp_path):
    """Eight host devices, 2 x 4; the fused q, k, v of SigLIP2 (3 x 16) is cut where tensors meet and inside of them."""
    avl.save(bundle_of(tiny_config(family)), tmp_path / "model")
    found = in_a_process(SHARDED, str(tmp_path / "model"), XLA_FLAGS=xla_flags(8))
    assert found["split"] > found["leaves"] // 2


@pytest.mark.parametrize("layout", ["rope_theta", "rope_parameters", "both"])
def test_both_places_of_rope_theta_are_read(layout, model):
    path = model / "config.json"
    raw = json.loads(path.read_text())
    theta = raw["text_config"].pop("rope_theta")
    if layout != "rope_parameters":
        raw["text_config"]["rope_theta"] = theta
    if layout != "rope_theta":
        raw["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    path.write_text(json.dumps(raw))
    assert avl.load(model).config == CONFIGS["aimv2"] and theta == 1e4
    raw["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    if layout == "rope_parameters":
        assert from_hf(raw).text.rope_theta == 5e5
    else:
        with pytest.raises(avl.UserError, match="rope_theta is 10000.0 .*500000.0"):
            from_hf(raw)
    assert to_hf(CONFIGS["aimv2"])["text_config"]["rope_theta"] == 1e4


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    """A hub that holds `model` (at a commit) with code beside it, and what was asked of it."""
    asked = []

    def snapshot_download(repo_id, revision=None, allow_patterns=()):
        asked.append((repo_id, revision, tuple(allow_patterns)))
        commit = tmp_path / "snapshots" / "0123abc"
        commit.mkdir(parents=True, exist_ok=True)
        (model / "modeling_andesvl.py").write_text("raise SystemExit('code of a checkpoint was run')")
        (model / "training_args.bin").write_bytes(b"a pickle")
        for pattern in allow_patterns:
            for file in model.glob(pattern):
                (commit / file.name).write_bytes(file.read_bytes())
        return str(commit)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    return SimpleNamespace(asked=asked, files=tmp_path / "snapshots" / "0123abc")


def test_a_hub_id_is_downloaded_at_its_revision_without_code(hub):
    found = avl.load("OPPOer/AndesVL-1B-Instruct", revision="v1")
    assert_equal_params(found.params, bundle_of(CONFIGS["aimv2"]).params)
    assert [(repo, revision) for repo, revision, _ in hub.asked] == [("OPPOer/AndesVL-1B-Instruct", "v1")]
    assert {f.suffix for f in hub.files.iterdir()} == {".json", ".safetensors"}


def test_pytorch_files_are_fetched_only_where_there_are_no_safetensors(hub, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(avl.UserError, match="pytorch_model.bin: not a readable file of PyTorch tensors"):
        avl.load("OPPOer/AndesVL-1B-Instruct")
    assert [revision for _, revision, _ in hub.asked] == [None, "0123abc"]  # the commit of the first download
    assert not (hub.files / "training_args.bin").exists()


def test_without_a_network_the_sentence_says_what_to_do(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        avl.UserError, match="^OPPOer/no-such-model: no such directory, and not to be had .*give a directory"
    ) as e:
        avl.load("OPPOer/no-such-model")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["../x/y", "/nowhere", "nowhere", "a/b/c", "a/", "./a/b", "a/../b", "https://x/y", "-a/\n"])
def test_what_is_no_hub_id_is_not_looked_for(name, hub):
    with pytest.raises(avl.UserError, match="no such directory"):
        avl.load(name)
    assert not hub.asked


def test_a_revision_of_a_directory_is_refused(model):
    with pytest.raises(avl.UserError, match="revision is 'main' for a directory"):
        avl.load(model, revision="main")
