"""Does an export say what the model says? The runner answers in a fresh process; the ordinary forward judges every step."""

import functools
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.checkpoints.json_file import read_json
from andesvl_jax.config import AndesVLConfig
from andesvl_jax.errors import UserError
from andesvl_jax.export import runner
from andesvl_jax.export.artifact import MANIFEST
from andesvl_jax.export.functions import prompt_arrays
from andesvl_jax.inputs.image import Patches
from andesvl_jax.inputs.packing import MERGED, Batch, Sample, assemble_prompts, make_sample
from andesvl_jax.model.andesvl import AndesVL, embed_inputs, encode_images
from andesvl_jax.model.attention import Place
from andesvl_jax.model.decoder import decode, logits

EXACT = 1e-4  # float32: largest absolute difference of visual tokens and logits
SHARE = {"bfloat16": 0.05, "int8": 0.2}  # rounded exports: largest difference as a share of the largest magnitude
AGREEMENT = {"float32": 1.0, "bfloat16": 0.75, "int8": 0.75}  # share of steps whose greedy token is the model's


def export_checks(
    bundle: Bundle, directory: str | os.PathLike, sample: Sample | None = None, new_tokens: int = 16
) -> dict[str, dict[str, Any]]:
    """Compares an export with the model it was made from.

    Args:
      sample: one prompt (`decoding.api.prompt_sample`); None makes up as many (random picture, random ids) as every exported
        size needs to be used.
    Returns:
      {stage: {"max_abs_diff": float, "ok": bool}}, the worst over the prompts, for encode_images_<P> (visual tokens),
      prefill_<T> (logits of the first new token), decode (of the others) and greedy (all), whose "agreement" is the share of
      the answer's tokens that the model, after the same tokens, picks too: at 1.0 the greedy answers are equal. `ok` holds
      float32 to EXACT and equal answers, rounded exports to SHARE of the largest magnitude and to AGREEMENT.
    Raises:
      UserError: no export in `directory`, or its runner fails.
    """
    directory = Path(directory)
    manifest = _manifest(directory)
    samples = [sample]
    if sample is None:
        samples = [made_up_sample(bundle, *sizes) for sizes in _size_pairs(manifest["patches"], manifest["prompt"])]
        new_tokens = min(new_tokens, manifest["slots"] - max(manifest["prompt"]) + 1)
    checks: dict[str, dict[str, Any]] = {}
    for one in samples:
        for stage, found in _check_prompt(bundle, directory, manifest, one, new_tokens).items():
            checks[stage] = _worse(checks.get(stage, found), found)
    return checks


def _check_prompt(
    bundle: Bundle, directory: Path, manifest: dict[str, Any], sample: Sample, new_tokens: int
) -> dict[str, dict[str, Any]]:
    config = bundle.decoding_config.replace(remat="none")
    if manifest["kind"] == "litert":
        config = config.replace(dtype="float32")  # weights are cast where they are used
    got = run_fresh(directory, assemble_prompts([sample], config.vision.patch_features), new_tokens, stop_ids=())
    ids, first = got["ids"], len(sample.tokens) - 1
    wanted = _reference(bundle.decoding_params, config, _with_answer(sample, ids, config))
    scores = np.asarray(wanted["logits"][0, first : first + len(ids)])
    compare = functools.partial(_compare, precision=manifest["precision"])
    *encoder, prefill = got["stages"].tolist()
    checks = {}
    for stage in encoder:
        visual = np.asarray(wanted["visual"][0, : sample.patches // MERGED], np.float32)
        checks[stage] = compare(got["visual"][0, : len(visual)], visual)
    checks[prefill] = compare(got["logits"][:1], scores[:1])
    if len(ids) > 1:
        checks["decode"] = compare(got["logits"][1:], scores[1:])
    agreement = float(np.mean(scores.argmax(-1) == ids))
    difference = compare(got["logits"], scores)["max_abs_diff"]
    checks["greedy"] = {"max_abs_diff": difference, "ok": agreement >= AGREEMENT[manifest["precision"]], "agreement": agreement}
    return checks


def _compare(got: np.ndarray, wanted: np.ndarray, precision: str) -> dict[str, Any]:
    difference = float(np.abs(got - wanted).max())
    limit = EXACT if precision == "float32" else SHARE[precision] * float(np.abs(wanted).max())
    return {"max_abs_diff": difference, "ok": difference <= limit}


def _worse(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    worst = {"max_abs_diff": max(a["max_abs_diff"], b["max_abs_diff"]), "ok": a["ok"] and b["ok"]}
    return worst | ({"agreement": min(a["agreement"], b["agreement"])} if "agreement" in a else {})


def run_fresh(directory: Path, batch: Batch, new_tokens: int, stop_ids: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What the runner finds in an isolated process: ids int32 [n], logits [n, V], visual [1, M, D] float32, stages (names).

    Raises UserError with the runner's message when it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        prompt, trace = Path(scratch) / "prompt.npz", Path(scratch) / "trace.npz"
        np.savez(prompt, **prompt_arrays(batch))
        command = [sys.executable, "-I", runner.__file__, str(prompt), "--model", str(directory.resolve()), "--trace", str(trace)]
        command += ["--max-new-tokens", str(new_tokens), "--stop-ids", ",".join(map(str, stop_ids))]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{directory}: its runner ended with status {done.returncode} ({reason}), expected an answer.")
        with np.load(trace) as file:
            return dict(file)


def made_up_sample(bundle: Bundle, patches: int, tokens: int) -> Sample:
    """Random ids around one random picture, nearly filling P = `patches` and T = `tokens`; the same every time."""
    config, rng = bundle.config, np.random.default_rng(0)
    rows, columns = _grid(min(patches, MERGED * (tokens - 8)) - MERGED)  # some padding, and room for text
    place = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1)
    coordinates = place.reshape(rows // 2, 2, columns // 2, 2, 2).swapaxes(1, 2).reshape(-1, 2).astype(np.int32)
    pixels = rng.standard_normal((rows * columns, config.vision.patch_features), np.float32)
    picture = Patches(np.zeros((0, 0, 3), np.uint8), pixels, coordinates, (rows, columns))
    slot = 0 if config.image_token_id is None else config.image_token_id
    text = rng.integers(0, config.text.vocab_size - 1, max(tokens - 2 - picture.visual_tokens, 1))
    text += text >= slot  # any id but the image slot's
    ids = np.concatenate([text[:3], np.full(picture.visual_tokens, slot), text[3:]])
    return make_sample(ids, np.zeros(len(ids), bool), [picture], slot)


def _size_pairs(patches: list[int], tokens: list[int]) -> list[tuple[int, int]]:
    """Pairs in which every size occurs, small with small."""
    pairs = itertools.zip_longest(patches, tokens)
    return [(p or patches[-1], t or tokens[-1]) for p, t in pairs]


def _grid(patches: int) -> tuple[int, int]:
    """Rows and columns, even and at least 2, of the squarest picture of at most `patches` patches."""
    rows = max(int(max(patches, 0) ** 0.5) // 2 * 2, 2)
    return rows, max(patches // rows // 2 * 2, 2)


def _manifest(directory: Path) -> dict[str, Any]:
    manifest = read_json(directory / MANIFEST)
    if manifest.get("kind") not in ("stablehlo", "litert"):
        raise UserError(f"{directory / MANIFEST}: kind is {manifest.get('kind')!r}, expected 'stablehlo' or 'litert'.")
    return manifest


def _with_answer(sample: Sample, ids: np.ndarray, config: AndesVLConfig) -> Batch:
    """The prompt and its answer as one row; an image slot's id among the answer's is text there."""
    batch = assemble_prompts([sample], config.vision.patch_features)
    length, total = len(sample.tokens), len(sample.tokens) + len(ids)
    grow = lambda x, fill: np.pad(x, [(0, 0), (0, max(total - x.shape[1], 0))], constant_values=fill)  # noqa: E731
    tokens, positions = grow(batch.tokens, 0), grow(batch.positions, -1)
    tokens[0, length:total], positions[0, :total] = ids, np.arange(total)
    return batch.replace(tokens=tokens, positions=positions, visual_index=grow(batch.visual_index, -1))


@functools.partial(jax.jit, static_argnames=("config",))
def _reference(params: AndesVL, config: AndesVLConfig, batch: Batch) -> dict[str, jax.Array]:
    """visual [1, M, D] and logits [1, T, V] of the ordinary forward, without a cache."""
    visual = None if batch.images is None else encode_images(params, config, batch.images)
    x = embed_inputs(params, config, batch.tokens, visual, batch.visual_index)
    hidden = decode(params.decoder, config, x, Place(batch.positions), keep_kv=False).hidden
    return {"visual": visual, "logits": logits(params.decoder, hidden)}
