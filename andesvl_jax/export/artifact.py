"""An export as a directory: manifest.json, the programs, and the stand-alone `run.py` that answers from them."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.errors import UserError
from andesvl_jax.export import runner
from andesvl_jax.export.functions import ExportShapes, Specs, Stage

MANIFEST = "manifest.json"
RUNNER = "run.py"


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[Path]:
    """A staging directory that becomes `directory` when the block ends well: an export appears whole or not at all.

    Raises UserError when `directory` holds something that is no export, or the disk refuses.
    """
    if directory.exists() and not _replaceable(directory):
        raise UserError(
            f"{directory}: exists and is no earlier export ({MANIFEST} or {RUNNER} is missing), expected a new directory."
        )
    directory, staging = directory.resolve(), None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        yield staging
        staging.chmod(0o755)
        if directory.exists():
            directory.rename(staging.with_name(staging.name + ".old"))  # directories cannot be replaced in one step
        staging.rename(directory)
    except OSError as error:
        raise UserError(f"{directory}: the export could not be written ({error}).") from error
    finally:
        if staging is not None:
            _tidy(staging, directory)


def _tidy(staging: Path, directory: Path) -> None:
    """Puts the earlier export back if the new one did not get its place, and removes what is left over."""
    old = staging.with_name(staging.name + ".old")
    if old.exists() and not directory.exists():
        old.rename(directory)
    for rest in (old, staging):
        shutil.rmtree(rest, ignore_errors=True)


def _replaceable(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    return all((directory / name).is_file() for name in (MANIFEST, RUNNER)) or not any(directory.iterdir())


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
