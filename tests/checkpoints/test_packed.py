"""Packed checkpoints: round trips of every scheme, compressed-tensors as the other side, and directories that do not fit."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import tiny_config, tiny_params

import andesvl_jax as avl
from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.checkpoints.hf import save
from andesvl_jax.cli import main
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.weights import (
    ALL_MATRICES,
    DECODER_MATRICES,
    Int4,
    Int8,
    Packed,
    Quantize,
    Recipe,
    Rule,
    Ternary,
    dense,
    is_leaf,
    represent,
)

FAMILIES = {name: tiny_config(name, text={"tie_word_embeddings": False}) for name in ("aimv2", "siglip2")}
TABLES = r"decoder\.(embedding|head)"
EVERY = {
    "int8": (Rule(ALL_MATRICES, Quantize(Int8())), Rule(TABLES, Quantize(Int8(), axis=-1))),
    "int4": (Rule(ALL_MATRICES, Quantize(Int4(8))), Rule(TABLES, Quantize(Int4(), axis=-1))),
    "ternary": (Rule(ALL_MATRICES, Quantize(Ternary())), Rule(TABLES, Quantize(Ternary(8), axis=-1))),
    "mixed": (
        Rule(DECODER_MATRICES, Quantize(Ternary(8))),
        Rule(r"vision\.layers\.qkv", Quantize(Int4())),
        Rule(r"projector\.fc1", Quantize(Int8(8))),
    ),
}


@functools.cache
def bundle(family: str = "aimv2", rules: str | None = None) -> Bundle:
    config = FAMILIES[family]
    mean_std = {} if family == "aimv2" else {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    processor = ImageProcessor(patch_size=config.vision.patch_size, **mean_std)
    params, recipe = tiny_params(config), None if rules is None else Recipe(EVERY[rules])
    return Bundle(config, params if recipe is None else represent(params, recipe), None, processor, {}, recipe)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rules", EVERY)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_back_bit_for_bit(family, rules, tmp_path):
    packed = bundle(family, rules)
    save(packed, tmp_path / "m")
    found = avl.load(tmp_path / "m")
    assert_same(found.params, packed.params)
    assert any(isinstance(w, Packed) for w in jax.tree.leaves(found.params, is_leaf=is_leaf))
    save(found, tmp_path / "again")
    for name in os.listdir(tmp_path / "m"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "m" / name).read_bytes(), name
    half = avl.load(tmp_path / "m", dtype="bfloat16")  # scales and codes keep their types
    assert_same(half.params.decoder.layers.q, packed.params.decoder.layers.q)
    assert half.params.decoder.norm.dtype == jax.numpy.bfloat16


def test_a_fresh_process_answers_as_this_one_and_info_counts_the_bytes_of_the_file(tmp_path, capsys):
    packed = bundle("aimv2", "mixed")
    save(packed, tmp_path / "m")
    script = (
        "import sys, andesvl_jax as avl\n"
        "for lean in (False, True):\n"
        "    bundle = avl.load(sys.argv[1], decode_only=lean)\n"
        "    print(avl.generate(bundle, [1, 2, 3], max_new_tokens=6, stop_ids=()).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "m"], capture_output=True, text=True)
    expected = str(avl.generate(packed, [1, 2, 3], max_new_tokens=6, stop_ids=()).tolist())
    assert done.stdout.splitlines() == [expected] * 2, done.stderr
    assert main(["info", "--model", str(tmp_path / "m"), "--json"]) == 0
    info = json.loads(capsys.readouterr().out.splitlines()[-1])
    size = os.stat(tmp_path / "m" / "model.safetensors").st_size
    assert info["bytes_on_disk"] == size
    assert info["bpw_all"] == round(8 * size / info["parameters"]["total"], 3)
    matrices = packed.params.decoder.layers
    held = sum(x.nbytes for name in ("q", "k", "v", "o", "gate", "up", "down") for x in jax.tree.leaves(getattr(matrices, name)))
    weights = sum(dense(getattr(matrices, name)).size for name in ("q", "k", "v", "o", "gate", "up", "down"))
    assert info["bpw_body"] == round(8 * held / weights, 3)


@pytest.mark.parametrize("rules", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_tensors_reads_the_same_weights(family, rules, tmp_path):
    pack_quantized = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    torch = pytest.importorskip("torch")
    packed = bundle(family, rules)
    save(packed, tmp_path / "m")
    save(dataclasses.replace(packed, params=jax.tree.map(dense, packed.params, is_leaf=is_leaf), recipe=None), tmp_path / "dense")
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    parsed = quantization.QuantizationConfig.model_validate(config)
    tensors, expected = load_file(tmp_path / "m" / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    names = [name.removesuffix("_packed") for name in tensors if name.endswith("_packed")]
    assert len(names) > 10
    for name in names:
        module = name.removesuffix(".weight")
        scheme = next(s for s in parsed.config_groups.values() if any(re.fullmatch(t[3:], module) for t in s.targets))
        state = {f"weight_{part}": torch.from_numpy(tensors[f"{name}_{part}"]) for part in ("packed", "scale", "shape")}
        found = pack_quantized.PackedQuantizationCompressor.decompress(state, scheme)["weight"].numpy()
        np.testing.assert_array_equal(found, expected[name])


def test_a_directory_that_others_packed_needs_no_recipe(tmp_path):
    packed = bundle("siglip2", "int4")
    save(packed, tmp_path / "m")
    (tmp_path / "m" / "recipe.json").unlink()
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = "language_model.model.layers.0.self_attn.q_proj.weight_packed"
    tensors[name][0, 0] &= ~0xF  # the lowest code, -8, which this project's encoder does not write
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    found = avl.load(tmp_path / "m")
    assert jax.tree.structure(found.params) == jax.tree.structure(packed.params)
    q, scale = dense(found.params.decoder.layers.q), packed.params.decoder.layers.q.arrays["scale"]
    assert float(q[0, 0, 0]) == -8 * float(scale[0, 0, 0])
    np.testing.assert_array_equal(q[0, 1:], dense(packed.params.decoder.layers.q)[0, 1:])


def broken(tmp_path: Path, change=None, recipe=None) -> Path:
    save(bundle("aimv2", "mixed"), tmp_path / "m")
    if change is not None:
        tensors = load_file(tmp_path / "m" / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "m" / "model.safetensors")
    if recipe is not None:
        raw = json.loads((tmp_path / "m" / "recipe.json").read_text())
        recipe(raw)
        (tmp_path / "m" / "recipe.json").write_text(json.dumps(raw))
    return tmp_path / "m"


Q0, QKV0 = "language_model.model.layers.0.self_attn.q_proj.weight", "vision_encoder.trunk.blocks.0.attn.qkv.weight"


def set_to(name: str, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q0}_scale"), f"1 missing .{Q0}_scale"),
        (lambda t: t.pop(f"{QKV0}_packed"), f"1 missing .{QKV0}_packed"),
        (set_to(f"{Q0}_scale", np.ones((3, 2), np.float32)), rf"{Q0}_scale has shape \[3, 2\], expected \[32, 3\]"),
        (set_to(f"{Q0}_codes", np.ones((32, 5), np.int32)), f"{Q0}_codes has type I32, expected uint8"),
        (set_to(f"{Q0}_codes", np.full((32, 5), 250, np.uint8)), "a code byte of 250, expected at most 242"),
        (set_to(f"{Q0}_scale", np.full((32, 3), np.nan, np.float32)), "a scale that is not finite"),
        (set_to(Q0, np.ones((32, 24), np.float32)), f"1 unknown .{Q0}"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        avl.load(broken(tmp_path, change))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            lambda r: r["weights"]["decoder.layers.q"].update(scheme="int3"),
            "scheme of decoder.layers.q is 'int3', expected",
        ),
        (lambda r: r["weights"]["decoder.layers.q"].update(zero=1), "expected the fields axis, group, scheme"),
        (lambda r: r["weights"]["decoder.layers.q"].update(group=0), "group 0"),
        (lambda r: r["weights"]["decoder.layers.q"].update(group=7), "groups of 7"),
        (lambda r: r["weights"].update(query=r["weights"]["decoder.layers.q"]), "'query' matches none of the"),
        (lambda r: r.update(format="x"), "expected format"),
        (lambda r: r["weights"].pop("decoder.layers.q"), "missing .*q_proj.weight, .*unknown .*q_proj.weight_codes"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(recipe, message, tmp_path):
    with pytest.raises(UserError, match=message):
        avl.load(broken(tmp_path, recipe=recipe))


@pytest.mark.parametrize("name", ["w8", "w4", "ternary"])
def test_compress_writes_a_directory_that_answers(name, tmp_path, capsys):
    recipe = str(Path(__file__).resolve().parents[2] / "configs" / "compress" / f"{name}.py")
    command = ["compress", "--model", "nano", "--recipe", recipe, "--out", str(tmp_path / "m"), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == {"recipe", "out", "bytes_on_disk", "bpw_body", "bpw_all", "seconds"}
    assert found["bytes_on_disk"] == os.stat(tmp_path / "m" / "model.safetensors").st_size
    bits = {"w8": 8, "w4": 4, "ternary": 8 / 5}[name]
    assert bits < found["bpw_body"] < bits + 1.1  # a float32 scale for 32 weights is one bit
    packed = avl.load(tmp_path / "m")
    if name != "ternary":  # nano, rounded to three values, says nothing
        picture = Path(__file__).resolve().parents[2] / "docs" / "example.png"
        messages = [{"role": "user", "content": "<image>How many shapes are there?"}]
        expected = avl.chat(avl.load("nano"), messages, images=[picture], max_new_tokens=4)
        assert avl.chat(packed, messages, images=[picture], max_new_tokens=4) == expected
    assert main([*command[:2], str(tmp_path / "m"), *command[3:]]) == 2
    assert "packed already, expected a dense model" in capsys.readouterr().err


def test_a_recipe_that_does_not_fit_leaves_what_was_there(tmp_path, capsys):
    file = tmp_path / "recipe.py"
    out = tmp_path / "m"
    shutil.copytree(Path(avl.__file__).parent / "shipped" / "nano", out)
    before = (out / "model.safetensors").read_bytes()
    imports = "from andesvl_jax.weights import *\n"
    for text, message in (
        (imports + "get_recipe = lambda: Recipe((Rule(r'decoder.layers.query', Quantize(Int8())),))", "matches none of the"),
        (imports + "get_recipe = lambda: Recipe((Rule(r'decoder.norm', Quantize(Int8())),))", "not a norm or a bias"),
        (imports + "get_recipe = lambda: Recipe((Rule(r'decoder.layers.q', Quantize(Int4(7))),))", "groups of 7"),
        ("x = 1", "has no get_recipe"),
    ):
        file.write_text(text)
        assert main(["compress", "--model", "nano", "--recipe", str(file), "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
        assert (out / "model.safetensors").read_bytes() == before
