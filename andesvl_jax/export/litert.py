"""Export to LiteRT (`.tflite`) by way of StableHLO and `litert-converter`: no TensorFlow, no PyTorch. Weights are in the files.

The converter's Python interface is undocumented, so its version is pinned in requirements.txt.
"""

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import export

from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.errors import UserError
from andesvl_jax.export.artifact import describe_stage, file_sizes, write_manifest, writing
from andesvl_jax.export.functions import ExportShapes, Specs, Stage, stages
from andesvl_jax.model.andesvl import AndesVL
from andesvl_jax.weights import dense, is_leaf
from andesvl_jax.weights.leaf import embed, leaf_kind

FILES = {"encode_images": "encode_images.tflite", "prefill": "decoder.tflite", "decode": "decoder.tflite"}
LOWERING = "builtin.module(vhlo-legalize-stablehlo,reconcile-unrealized-casts,inline,strip-debuginfo)"


@leaf_kind
@struct.dataclass
class LookupTable:
    """A table [E, D] whose rows are read by LiteRT's own operator, which the quantizer knows (a gather would stay float)."""

    weight: jax.Array


@embed.register(LookupTable)
def _(w: LookupTable, ids, dtype):
    read = jax.lax.composite(lambda ids, table: jnp.take(table, ids, axis=0), "odml.embedding_lookup")
    return read(ids.reshape(-1), w.weight).reshape(*ids.shape, -1).astype(dtype)


@dense.register(LookupTable)
def _(w: LookupTable, dtype=None):
    return dense(w.weight, dtype)


def export_litert(
    bundle: Bundle, out_dir: str | os.PathLike, shapes: ExportShapes = ExportShapes(), quantize: Literal["int8"] | None = None
) -> dict[str, int]:
    """Writes encode_images.tflite, decoder.tflite (a signature per stage), manifest.json and run.py; replaces an earlier export.

    Everything runs in float32. quantize="int8" stores the matrices in 8 bits, one scale per output channel, and rounds their
    inputs to 8 bits row by row at run time; such files are right only under the interpreter's default XNNPACK delegate.

    Returns:
      file name -> bytes.
    Raises:
      UserError: an unknown `quantize`, weights that have no dense form, sizes that the model cannot have, or a disk that refuses.
    """
    if quantize not in (None, "int8"):
        raise UserError(f"quantize is {quantize!r}, expected None or 'int8'.")
    out_dir = Path(out_dir)
    config = bundle.config.replace(dtype="float32", param_dtype="float32", attention="einsum")  # the chunked form is a loop
    todo = stages(float_params(bundle.params), config, shapes)
    with writing(out_dir) as staging:
        entries: dict[str, dict[str, Any]] = {}
        for file in dict.fromkeys(FILES.values()):
            mine = [stage for stage in todo if _file(stage) == file]
            model, outputs = convert(mine)
            (staging / file).write_bytes(_quantized(model) if quantize == "int8" else model)
            entries |= {stage.name: describe_stage(stage, out, file) for stage, out in zip(mine, outputs, strict=True)}
        write_manifest(staging, bundle, shapes, entries, kind="litert", precision=quantize or "float32")
    return file_sizes(out_dir)


def float_params(params: AndesVL) -> AndesVL:
    """Every leaf as one float32 array, adapters merged and packed codes expanded; the token table as a `LookupTable`."""
    try:
        params = jax.tree.map(lambda w: dense(w, jnp.float32), params, is_leaf=is_leaf)
    except ValueError as error:
        raise UserError(f"the weights cannot be exported to LiteRT ({error}).") from error
    return params.replace(decoder=params.decoder.replace(embedding=LookupTable(params.decoder.embedding)))


def convert(todo: Sequence[Stage]) -> tuple[bytes, list[Specs]]:
    """Stages as signatures of one flatbuffer, weights baked in and those they share stored once; and the outputs of each."""
    from litert_converter.mlir import ir, passmanager
    from litert_converter.mlir._mlir_libs import converter_api_ext as converter

    context = ir.Context()
    converter.prepare_mlir_context(context)
    context.allow_unregistered_dialects = True
    modules, outputs = [], []
    for stage in todo:
        exported = _lower(stage)
        outputs.append(exported.out_tree.unflatten(exported.out_avals))
        with context, ir.Location.unknown():
            module = ir.Module.parse(exported.mlir_module_serialized)
            passmanager.PassManager.parse(LOWERING).run(module.operation)
            converter.set_signature(
                module.operation, signature_name=stage.name, input_names=sorted(_inputs(stage)), output_names=sorted(outputs[-1])
            )
        modules.append(module)
    with context, ir.Location.unknown():
        merged = converter.merge_modules(modules)
        settings = converter.ConvertToTFLConfig()
        settings.model_origin_framework = "JAX"
        settings.enable_x64 = False
        converter.run_convert_to_tfl_passes(merged, passmanager.PassManager(), settings)
        return converter.export_flatbuffer_to_bytes(merged.operation), outputs


def _lower(stage: Stage) -> export.Exported:
    """The stage over one dict of inputs, which jax orders by name; the weights are constants."""

    def call(inputs):  # a new closure for each export: jit would find the old weights under the old one
        return stage.call(stage.weights, inputs, inputs)

    return export.export(jax.jit(call, keep_unused=True), platforms=("cpu",))(_inputs(stage))


def _inputs(stage: Stage) -> Specs:
    return {**stage.cache, **stage.inputs}


def _file(stage: Stage) -> str:
    return next(file for prefix, file in FILES.items() if stage.name.startswith(prefix))


def _quantized(model: bytes) -> bytes:
    from litert_quantizer import quantizer, recipe

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # bars of a second's work
        return bytes(quantizer.Quantizer(model, recipe.dynamic_wi8_afp32()).quantize().quantized_model)
