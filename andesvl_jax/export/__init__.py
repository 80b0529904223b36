"""Export a bundle and check what was written: `export(bundle, out, "stablehlo" | "litert")`."""

from pathlib import Path
from typing import Any

from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.errors import UserError
from andesvl_jax.export.checks import export_checks
from andesvl_jax.export.functions import ExportShapes
from andesvl_jax.export.litert import export_litert
from andesvl_jax.export.stablehlo import export_stablehlo
from andesvl_jax.inputs.packing import Sample


def export(
    bundle: Bundle, out: Path, form: str, quantize: str | None = None, shapes: ExportShapes = ExportShapes(),
    sample: Sample | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes `out` and runs it in a fresh process.

    Args:
      form: "stablehlo" or "litert"; quantize: None or (LiteRT) "int8"; sample: the prompt of the check, made up if None.
    Returns:
      {"files": {name: bytes}, "checks": {stage: {"max_abs_diff", "ok"}}}.
    """
    if form == "stablehlo" and quantize is None:
        files = export_stablehlo(bundle, out, shapes)
    elif form == "litert":
        files = export_litert(bundle, out, shapes, quantize)
    else:
        raise UserError(f"export format is {form!r} with weights {quantize!r}, expected stablehlo, litert, or litert with int8.")
    return {"files": files, "checks": export_checks(bundle, out, sample)}
