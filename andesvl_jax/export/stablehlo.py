"""Export to StableHLO through `jax.export`: small programs that take the weights as arguments, and the weights beside them."""

import os
from pathlib import Path

import jax
import numpy as np
from jax import export
from safetensors import SafetensorError
from safetensors.numpy import save_file

from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.errors import UserError
from andesvl_jax.export.artifact import describe_stage, file_sizes, write_manifest, writing
from andesvl_jax.export.functions import ExportShapes, Stage, stages

PLATFORMS = ("cpu", "cuda", "tpu")  # one program serves all: nothing in it is lowered differently
WEIGHTS = "weights.safetensors"


def export_stablehlo(bundle: Bundle, out_dir: str | os.PathLike, shapes: ExportShapes = ExportShapes()) -> dict[str, int]:
    """Writes `<stage>.stablehlo` for each stage, weights.safetensors, manifest.json and run.py; an earlier export is replaced.

    Weights keep their dtype and kind: packed leaves stay packed, and their codes and scales are arguments of their own.

    Returns:
      file name -> bytes.
    Raises:
      UserError: sizes that the model cannot have, a directory that holds something else, or a disk that refuses.
    """
    out_dir = Path(out_dir)
    todo = stages(bundle.params, bundle.config, shapes)
    with writing(out_dir) as staging:
        entries = {}
        for stage in todo:
            exported = lower(stage)
            file = f"{stage.name}.stablehlo"
            (staging / file).write_bytes(exported.serialize())
            outputs = exported.out_tree.unflatten(exported.out_avals)
            entries[stage.name] = describe_stage(stage, outputs, file) | {"weights": list(stage.weights)}
        weights = {name: np.asarray(x) for stage in todo for name, x in stage.weights.items()}
        try:
            save_file(weights, staging / WEIGHTS)
        except SafetensorError as error:
            raise UserError(f"{out_dir / WEIGHTS}: could not be written ({error}).") from error
        write_manifest(staging, bundle, shapes, entries, kind="stablehlo", precision=bundle.config.dtype, weights=WEIGHTS)
    return file_sizes(out_dir)


def lower(stage: Stage) -> export.Exported:
    """The stage as a portable program over (weights, cache, inputs), the cache donated."""
    weights = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in stage.weights.items()}
    return export.export(jax.jit(stage.call, donate_argnums=1), platforms=PLATFORMS)(weights, stage.cache, stage.inputs)
