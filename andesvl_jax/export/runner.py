"""Answers a prompt from an exported directory. Stands alone: an export holds a copy as run.py, which needs NumPy and the
runtime of its kind (`jax` and `safetensors`, or `ai-edge-litert`) and no other part of this project.

    python run.py PROMPT.npz [--max-new-tokens 16] [--stop-ids 3,5] [--trace TRACE.npz]

PROMPT.npz holds one prompt: tokens, positions, visual_index int32 [1, T] (-1: padding, text) and, with images, patches
float32 [1, P, 3pp], coordinates, grids int32 [1, P, 2] and image_segments int32 [1, P] (-1: padding). Prints one JSON line.
"""

import argparse
import json
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, Callable

import numpy as np

Arrays = dict[str, Any]
Call = Callable[[str, Arrays, Arrays], Arrays]  # (stage, cache, inputs) -> outputs; the cache may be consumed
TOKEN_FILLS = {"tokens": 0, "positions": -1, "visual_index": -1}  # what stands at padding
IMAGE_FILLS = {"patches": 0, "coordinates": 0, "grids": 1, "image_segments": -1}
DTYPES = {"float32": np.float32, "int32": np.int32}


def open_export(directory: Path) -> tuple[dict[str, Any], Call]:
    """Manifest and caller. Raises ValueError for a directory that is no export, or a runtime too old for it."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        opener = {"stablehlo": open_stablehlo, "litert": open_litert}[manifest["kind"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory}: manifest.json is missing or not that of an export ({error}).") from error
    return manifest, opener(directory, manifest)


def open_stablehlo(directory: Path, manifest: dict[str, Any]) -> Call:
    """Programs compiled for this machine on first use; weights are put on the device once."""
    import jax
    from jax import export
    from safetensors.numpy import load_file  # the flax reader would import flax

    if [int(x) for x in jax.__version__.split(".")[:2]] < [int(x) for x in manifest["jax"].split(".")[:2]]:
        raise ValueError(f"{directory}: found jax {jax.__version__}, expected {manifest['jax']}, which exported it, or newer.")
    weights = jax.device_put(load_file(directory / manifest["weights"]))
    programs = {}
    for name, stage in manifest["stages"].items():
        exported = export.deserialize(bytearray((directory / stage["file"]).read_bytes()))
        mine = {n: weights[n] for n in stage["weights"]}
        programs[name] = (jax.jit(exported.call, donate_argnums=1), mine)  # donation is asked for again by the caller

    def call(name: str, cache: Arrays, inputs: Arrays) -> Arrays:
        program, mine = programs[name]
        return program(mine, cache, inputs)

    return call


def open_litert(directory: Path, manifest: dict[str, Any]) -> Call:
    """Signature runners of the LiteRT interpreter with its default XNNPACK delegate."""
    from ai_edge_litert.interpreter import Interpreter

    files = {stage["file"] for stage in manifest["stages"].values()}
    interpreters = {file: Interpreter(model_path=str(directory / file)) for file in sorted(files)}
    runners = {name: interpreters[s["file"]].get_signature_runner(name) for name, s in manifest["stages"].items()}

    def call(name: str, cache: Arrays, inputs: Arrays) -> Arrays:
        return runners[name](**cache, **inputs)

    return call


def read_prompt(path: Path) -> Arrays:
    """The arrays of one prompt. Raises ValueError naming the file and what is wrong with it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            prompt = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable npz file ({error}).") from error
    wanted = {*TOKEN_FILLS, *(IMAGE_FILLS if "patches" in prompt else ())}
    missing = sorted(wanted - set(prompt))
    if missing:
        raise ValueError(f"{path}: array {missing[0]} is missing, expected {', '.join(sorted(wanted))}.")
    odd = next((name for name in wanted if prompt[name].ndim < 2 or len(prompt[name]) != 1), None)
    if odd is not None:
        raise ValueError(f"{path}: array {odd} has shape {list(prompt[odd].shape)}, expected one row.")
    return prompt


def encode(call: Call, manifest: dict[str, Any], prompt: Arrays) -> tuple[np.ndarray, list[str]]:
    """Visual tokens [1, M, D] of the prompt's images, zeros behind, and the stage used: the smallest that holds the images."""
    spec = manifest["stages"][f"prefill_{manifest['prompt'][0]}"]["inputs"]["visual"]
    if "patches" not in prompt:
        return _empty(spec, 0), []
    size = _smallest(manifest["patches"], int(np.sum(prompt["image_segments"] >= 0)), "patches")
    inputs = {name: _fit(prompt[name], size, fill) for name, fill in IMAGE_FILLS.items()}
    stage = f"encode_images_{size}"
    return _fit(np.asarray(call(stage, {}, inputs)["visual"]), spec["shape"][1], 0), [stage]


def answer(call: Call, manifest: dict[str, Any], prompt: Arrays, limit: int, stop_ids) -> dict[str, Any]:
    """Greedy decoding: ids (the stop id included), the logits [n, V] they were picked from, the visual tokens, stages, seconds.

    Raises ValueError when the prompt or the answer does not fit the exported sizes.
    """
    started = time.perf_counter()
    length = int(np.sum(prompt["positions"] >= 0))
    width = _smallest(manifest["prompt"], min(length, max(manifest["prompt"])), "tokens")  # longer prompts go in pieces
    cursor = -(-length // width) * width
    if length < 1 or limit < 1:
        raise ValueError(f"the prompt has {length} tokens and {limit} are to follow, expected at least one of each.")
    if cursor + limit - 1 > manifest["slots"]:
        room = manifest["slots"] - cursor + 1
        raise ValueError(f"{limit} tokens are to follow a prompt of {length}, expected at most {room} (slots).")
    visual, stages = encode(call, manifest, prompt)
    stages.append(f"prefill_{width}")
    cache = {n: _empty(s, -1 if n == "cache_positions" else 0) for n, s in manifest["stages"]["decode"]["cache"].items()}
    for start in range(0, length, width):
        piece = {name: _fit(prompt[name][:, start:length], width, fill) for name, fill in TOKEN_FILLS.items()}
        out = call(stages[-1], cache, piece | {"visual": visual, "cursor": np.int32(start)})
        cache = {name: out[name] for name in cache}
    ids: list[int] = []
    scores = []
    while True:
        scores.append(np.asarray(out["logits"])[0])
        ids.append(int(scores[-1].argmax()))
        if ids[-1] in stop_ids or len(ids) == limit:
            break
        position = length + len(ids) - 1
        step = {"tokens": np.full((1, 1), ids[-1], np.int32), "positions": np.full((1, 1), position, np.int32)}
        out = call("decode", cache, step | {"cursor": np.int32(cursor + len(ids) - 1)})
        cache = {name: out[name] for name in cache}
    seconds = time.perf_counter() - started
    return {"ids": ids, "logits": np.stack(scores), "visual": visual, "stages": stages, "seconds": seconds}


def _smallest(sizes: list[int], needed: int, what: str) -> int:
    fitting = [size for size in sizes if size >= needed]
    if not fitting:
        raise ValueError(f"the prompt has {needed} {what}, expected at most {max(sizes)}, the largest exported size.")
    return min(fitting)


def _fit(x: np.ndarray, size: int, fill: int) -> np.ndarray:
    """Axis 1 cut or padded to `size`; what is cut is padding, for the caller chose a size that holds the rest."""
    x = x[:, :size]
    return np.pad(x, [(0, 0), (0, size - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=fill)


def _empty(spec: dict[str, Any], fill: int) -> np.ndarray:
    if spec["dtype"] == "bfloat16":
        import ml_dtypes

        return np.full(spec["shape"], fill, ml_dtypes.bfloat16)
    return np.full(spec["shape"], fill, DTYPES[spec["dtype"]])


def main() -> int:
    parser = argparse.ArgumentParser(description="Answers a prompt from this exported model.")
    parser.add_argument("prompt", type=Path, help="npz file of one prompt")
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parent, help="exported directory (default: here)")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--stop-ids", default=None, help="comma-separated ids; '' never stops (default: the model's)")
    parser.add_argument("--trace", type=Path, default=None, help="write visual tokens, logits and ids to this npz file")
    options = parser.parse_args()
    try:
        manifest, call = open_export(options.model)
        stops = manifest["stop_ids"] if options.stop_ids is None else [int(x) for x in options.stop_ids.split(",") if x]
        result = answer(call, manifest, read_prompt(options.prompt), options.max_new_tokens, stops)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.trace is not None:
        floats = {name: np.asarray(result[name], np.float32) for name in ("visual", "logits")}
        np.savez(options.trace, **floats, ids=np.array(result["ids"], np.int32), stages=np.array(result["stages"]))
    print(json.dumps({"ids": result["ids"], "seconds": round(result["seconds"], 3)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
