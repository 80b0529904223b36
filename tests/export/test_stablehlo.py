"""StableHLO exports: what they answer without this package, what they hold, and what they refuse."""

import dataclasses
import json

import jax.numpy as jnp
import pytest
from tiny import FAMILIES

from andesvl_jax.errors import UserError
from andesvl_jax.export.checks import EXACT, export_checks
from andesvl_jax.export.functions import ExportShapes, stages
from andesvl_jax.export.stablehlo import export_stablehlo, lower
from andesvl_jax.weights import Int4, Int8, Quantize, Rule, represent
from andesvl_jax.weights.lora import DECODER_MATRICES

SHAPES = ExportShapes(patches=(32,), prompt=(16,), slots=48)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stranger_gets_the_same_greedy_tokens(family, tiny_bundle, tiny_sample, greedy, stranger, tmp_path):
    bundle = tiny_bundle(family, vision={"full_attention_layers": (1,)})
    sample = tiny_sample(bundle)
    export_stablehlo(bundle, tmp_path / "made", SHAPES)
    moved = (tmp_path / "made").rename(tmp_path / "moved")

    ids, modules = stranger(moved, sample, "--max-new-tokens", "12", "--stop-ids", "")

    assert ids == greedy(bundle, sample)
    assert "jax" in modules and not modules & {"andesvl_jax", "flax"}


def test_the_golden_answer(golden, stranger, tmp_path):
    bundle, sample, ids = golden
    export_stablehlo(bundle, tmp_path / "made", ExportShapes((64,), (32,), 64))
    assert stranger(tmp_path / "made", sample, "--stop-ids", "")[0] == ids


def test_every_stage_is_checked_and_agrees(tiny_bundle, tmp_path):
    bundle = tiny_bundle("siglip2", text={"tie_word_embeddings": False})
    sizes = export_stablehlo(bundle, tmp_path / "made", ExportShapes((16, 32), (16, 24), 48))
    checks = export_checks(bundle, tmp_path / "made")
    assert set(checks) == {"encode_images_16", "encode_images_32", "prefill_16", "prefill_24", "decode", "greedy"}
    assert all(check["ok"] and check["max_abs_diff"] <= EXACT for check in checks.values())
    assert checks["greedy"]["agreement"] == 1.0
    assert sizes == {path.name: path.stat().st_size for path in (tmp_path / "made").iterdir()}


def test_packed_weights_stay_packed(tiny_bundle, tiny_sample, greedy, stranger, tmp_path):
    bundle = tiny_bundle("aimv2")
    dense = export_stablehlo(bundle, tmp_path / "dense", SHAPES)
    rules = [Rule(DECODER_MATRICES, Quantize(Int4())), Rule(r"vision\.layers\.(qkv|proj|fc.)", Quantize(Int8()))]
    params = represent(bundle.params, rules)
    bundle = dataclasses.replace(bundle, params=params)
    packed = export_stablehlo(bundle, tmp_path / "packed", SHAPES)
    sample = tiny_sample(bundle)
    assert stranger(tmp_path / "packed", sample, "--max-new-tokens", "12", "--stop-ids", "")[0] == greedy(bundle, sample)
    assert packed["weights.safetensors"] < 0.6 * dense["weights.safetensors"]


def test_bfloat16_runs_and_agrees_within_its_rounding(tiny_bundle, tmp_path):
    bundle = tiny_bundle("aimv2", dtype="bfloat16", param_dtype="bfloat16")
    export_stablehlo(bundle, tmp_path / "made", SHAPES)
    checks = export_checks(bundle, tmp_path / "made")
    assert all(check["ok"] for check in checks.values()), checks


def test_the_cache_is_donated_and_every_platform_is_served(tiny_bundle):
    bundle = tiny_bundle("aimv2")
    decode = stages(bundle.params, bundle.config, SHAPES)[-1]
    exported = lower(decode)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert exported.mlir_module().count("tf.aliasing_output") == len(decode.cache)


def test_the_manifest_names_what_goes_in_and_out(tiny_bundle, tmp_path):
    bundle = tiny_bundle("aimv2")
    export_stablehlo(bundle, tmp_path / "made", SHAPES)
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    stage = manifest["stages"]["prefill_16"]
    assert stage["inputs"]["visual"] == {"shape": [1, 8, 24], "dtype": "float32"}
    assert stage["outputs"]["logits"] == {"shape": [1, 64], "dtype": "float32"}
    assert set(stage["outputs"]) == {"logits", *stage["cache"]}
    assert manifest["stop_ids"] == [63] and manifest["slots"] == 48


def test_an_earlier_export_is_replaced_and_anything_else_is_not(tiny_bundle, tmp_path):
    bundle = tiny_bundle("aimv2")
    for slots in (48, 64):
        export_stablehlo(bundle, tmp_path / "made", dataclasses.replace(SHAPES, slots=slots))
    assert json.loads((tmp_path / "made" / "manifest.json").read_text())["slots"] == 64
    assert [path.name for path in tmp_path.iterdir()] == ["made"]

    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in ("precious", "file", "file/below"):
        with pytest.raises(UserError, match="expected a new directory|could not be written"):
            export_stablehlo(bundle, tmp_path / place, SHAPES)
    assert {path.name for path in tmp_path.iterdir()} == {"made", "precious", "file"}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"patches": (30,)}, "multiple of 4"),
        ({"patches": ()}, "one or more"),
        ({"prompt": (16, 16)}, "different"),
        ({"prompt": (48,)}, "more than the largest prompt"),
    ],
)
def test_impossible_sizes_are_refused(shapes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SHAPES, **shapes)


def test_slots_beyond_the_models_positions_are_refused(tiny_bundle, tmp_path):
    with pytest.raises(UserError, match="max_position_embeddings"):
        export_stablehlo(tiny_bundle("aimv2"), tmp_path / "made", dataclasses.replace(SHAPES, slots=257))


def test_the_runner_refuses_in_one_line(tiny_bundle, tiny_sample, stranger, tmp_path):
    bundle = tiny_bundle("aimv2")
    export_stablehlo(bundle, tmp_path / "made", SHAPES)
    ids, complaint = stranger(tmp_path / "made", tiny_sample(bundle), "--max-new-tokens", "40")
    assert ids is None and complaint == "error: 40 tokens are to follow a prompt of 14, expected at most 33 (slots).\n"
    _, complaint = stranger(tmp_path / "made", tiny_sample(bundle, grids=((4, 4), (6, 4))))
    assert complaint == "error: the prompt has 40 patches, expected at most 32, the largest exported size.\n"
    (tmp_path / "made" / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="manifest.json"):
        export_checks(bundle, tmp_path / "made")


def test_weights_are_arguments(tiny_bundle):
    """A program holds none of the numbers: it serves any weights of its shapes."""
    bundle = tiny_bundle("aimv2")
    for stage in stages(bundle.params, bundle.config, SHAPES):
        assert len(lower(stage).serialize()) < 60_000
        assert all(isinstance(x, jnp.ndarray) for x in stage.weights.values())
