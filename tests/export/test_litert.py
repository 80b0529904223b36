"""LiteRT exports in float32 and int8: what they answer in the LiteRT interpreter, how large they are, what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from tiny import FAMILIES

from andesvl_jax.errors import UserError
from andesvl_jax.export.checks import AGREEMENT, EXACT, export_checks
from andesvl_jax.export.functions import ExportShapes
from andesvl_jax.export.litert import export_litert
from andesvl_jax.weights import Adapt, Int8, Quantize, Rule, map_leaves, represent, stack_adapters
from andesvl_jax.weights.lora import DECODER_MATRICES

pytest.importorskip("litert_converter")
SHAPES = ExportShapes(patches=(32,), prompt=(16,), slots=48)
GOLDEN_SHAPES = ExportShapes(patches=(64,), prompt=(32,), slots=64)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stranger_gets_the_same_greedy_tokens(family, tiny_bundle, tiny_sample, greedy, stranger, tmp_path):
    bundle = tiny_bundle(family, vision={"full_attention_layers": (1,)})
    sample = tiny_sample(bundle)
    export_litert(bundle, tmp_path / "made", SHAPES)
    moved = (tmp_path / "made").rename(tmp_path / "moved")

    ids, modules = stranger(moved, sample, "--max-new-tokens", "12", "--stop-ids", "")

    assert ids == greedy(bundle, sample)
    assert "ai_edge_litert" in modules and not modules & {"andesvl_jax", "jax", "tensorflow", "torch"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_signature_agrees_with_the_forward_that_was_exported(family, tiny_bundle, tmp_path):
    bundle = tiny_bundle(family, text={"tie_word_embeddings": family == "aimv2"})
    export_litert(bundle, tmp_path / "made", ExportShapes((16, 32), (16, 24), 48))
    checks = export_checks(bundle, tmp_path / "made")
    assert set(checks) == {"encode_images_16", "encode_images_32", "prefill_16", "prefill_24", "decode", "greedy"}
    assert all(check["ok"] and check["max_abs_diff"] <= EXACT for check in checks.values()), checks
    assert checks["greedy"]["agreement"] == 1.0


def test_the_golden_answer(golden, stranger, tmp_path):
    bundle, sample, ids = golden
    export_litert(bundle, tmp_path / "made", GOLDEN_SHAPES)
    assert stranger(tmp_path / "made", sample, "--stop-ids", "")[0] == ids
    checks = export_checks(bundle, tmp_path / "made", sample)
    assert all(check["ok"] and check["max_abs_diff"] <= EXACT for check in checks.values()), checks


def test_int8_is_smaller_and_stays_near_the_model(golden, tmp_path):
    bundle, _, _ = golden
    full = export_litert(bundle, tmp_path / "float32", GOLDEN_SHAPES)
    small = export_litert(bundle, tmp_path / "int8", GOLDEN_SHAPES, quantize="int8")
    for file in ("encode_images.tflite", "decoder.tflite"):
        assert small[file] < 0.5 * full[file]
    checks = export_checks(bundle, tmp_path / "int8")
    assert all(check["ok"] for check in checks.values()), checks
    assert checks["prefill_32"]["max_abs_diff"] > EXACT  # it is rounded indeed
    assert checks["greedy"]["agreement"] >= AGREEMENT["int8"]


def test_weights_are_stored_once(tiny_bundle, tmp_path):
    bundle = tiny_bundle("aimv2", text={"vocab_size": 4096})  # the tied table, read by both ends of both signatures, dominates
    table = 4096 * 24
    assert export_litert(bundle, tmp_path / "float32", SHAPES)["decoder.tflite"] < 1.4 * 4 * table
    # each signature brings its own scale and zero point of every row, 12 bytes each: half a table of this small width
    assert export_litert(bundle, tmp_path / "int8", SHAPES, "int8")["decoder.tflite"] < 3.2 * table


@pytest.mark.parametrize("kind", ["adapter", "packed"])
def test_other_leaves_become_dense_first(kind, tiny_bundle, tmp_path):
    bundle = tiny_bundle("aimv2")
    params = (
        _adapted(bundle.params) if kind == "adapter" else represent(bundle.params, [Rule(DECODER_MATRICES, Quantize(Int8()))])
    )
    bundle = dataclasses.replace(bundle, params=params)
    export_litert(bundle, tmp_path / "made", SHAPES)
    checks = export_checks(bundle, tmp_path / "made")
    assert all(check["ok"] for check in checks.values()), checks


def test_bfloat16_weights_run_in_float32(tiny_bundle, tmp_path):
    bundle = tiny_bundle("aimv2", dtype="bfloat16", param_dtype="bfloat16", remat="layer", attention="chunked", attention_chunk=4)
    export_litert(bundle, tmp_path / "made", SHAPES)
    checks = export_checks(bundle, tmp_path / "made")
    assert all(check["max_abs_diff"] <= EXACT for check in checks.values()), checks


def test_what_cannot_be_exported_is_refused(tiny_bundle, tmp_path):
    bundle = tiny_bundle("aimv2")
    with pytest.raises(UserError, match="quantize is 'int3'"):
        export_litert(bundle, tmp_path / "made", SHAPES, quantize="int3")
    adapters = [_adapted(bundle.params), _adapted(bundle.params)]
    stacked = dataclasses.replace(bundle, params=stack_adapters(adapters, jnp.zeros(1, jnp.int32)))
    with pytest.raises(UserError, match="stack of adapters"):
        export_litert(stacked, tmp_path / "made", SHAPES)
    assert not list(tmp_path.iterdir())


def test_a_long_prompt_goes_in_pieces_and_a_text_needs_no_picture(tiny_bundle, tiny_sample, greedy, stranger, tmp_path):
    bundle = tiny_bundle("aimv2")
    export_litert(bundle, tmp_path / "made", ExportShapes((32,), (4, 6), 48))
    for sample in (tiny_sample(bundle), tiny_sample(bundle, grids=())):
        ids, _ = stranger(tmp_path / "made", sample, "--max-new-tokens", "12", "--stop-ids", "")
        assert ids == greedy(bundle, sample)


def test_stop_ids_are_those_of_the_model(tiny_bundle, tiny_sample, greedy, stranger, tmp_path):
    bundle = tiny_bundle("aimv2")
    sample = tiny_sample(bundle)
    third = greedy(bundle, sample)[2]
    bundle = dataclasses.replace(bundle, generation_config={"eos_token_id": third})
    export_litert(bundle, tmp_path / "made", SHAPES)
    assert stranger(tmp_path / "made", sample)[0] == greedy(bundle, sample, stop_ids=None)


def test_checks_find_an_export_of_other_weights(tiny_bundle, tmp_path):
    bundle = tiny_bundle("aimv2")
    export_litert(bundle, tmp_path / "made", SHAPES)
    other = jax.tree.map(lambda x: x * 1.01, bundle.params)
    checks = export_checks(dataclasses.replace(bundle, params=other), tmp_path / "made")
    assert not any(checks[stage]["ok"] for stage in ("encode_images_32", "prefill_16", "decode"))


def _adapted(params):
    """With adapters that matter: b is not zero."""
    params = represent(params, [Rule(DECODER_MATRICES, Adapt(2, 4.0))], jax.random.key(5))
    return map_leaves(lambda w: w.replace(b=0.3 * jnp.ones_like(w.b)), params, DECODER_MATRICES)
