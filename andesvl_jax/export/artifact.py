"""An export as a directory: manifest.json, the programs, and the stand-alone `run.py` that answers from them."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax

from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.checkpoints.staging import replacing
from andesvl_jax.export import runner
from andesvl_jax.export.functions import ExportShapes, Specs, Stage

MANIFEST = "manifest.json"
RUNNER = "run.py"


def writing(directory: Path) -> contextlib.AbstractContextManager[Path]:
    """A staging directory that becomes `directory` when the block ends well (`replacing`); only an earlier export is replaced."""
    return replacing(directory, "export", (MANIFEST, RUNNER))


def write_manifest(staging: Path, bundle: Bundle, shapes: ExportShapes, stages: dict[str, dict[str, Any]], **fields: str) -> None:
    """manifest.json (what a runner has to know) and the runner itself.

    Args:
      stages: name -> `describe_stage`. fields: kind ("stablehlo", "litert"), precision ("float32", "bfloat16", "int8"), and
        what else the kind's runner reads.
    """
    manifest = {
        **fields, "jax": jax.__version__, "image_token_id": bundle.config.image_token_id,
        "stop_ids": list(bundle.stop_ids), "slots": shapes.slots, "patches": sorted(shapes.patches),
        "prompt": sorted(shapes.prompt), "preprocessor": bundle.image_processor.to_hf(), "stages": stages,
    }  # fmt: skip
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(runner.__file__, staging / RUNNER)


def describe_stage(stage: Stage, outputs: Specs, file: str) -> dict[str, Any]:
    """The manifest entry of a stage: its file, and the shape and dtype of everything that goes in and out."""
    plain = lambda specs: {name: {"shape": list(s.shape), "dtype": str(s.dtype)} for name, s in specs.items()}  # noqa: E731
    return {"file": file, "inputs": plain(stage.inputs), "cache": plain(stage.cache), "outputs": plain(outputs)}


def file_sizes(directory: Path) -> dict[str, int]:
    """Name -> bytes of each file of an export."""
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
