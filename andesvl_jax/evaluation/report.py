"""Tables for the terminal and the one-page HTML report of a run."""

import base64
import io
from importlib import resources
from pathlib import Path
from typing import Any, Sequence

import matplotlib

matplotlib.use("Agg")  # no display is needed or asked for
import jinja2
import numpy as np
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw

from andesvl_jax.evaluation.benchmarks import Item
from andesvl_jax.evaluation.evaluate import DEPTHS, TaskResult
from andesvl_jax.evaluation.scorers import correct, parse_box

THUMBNAIL = 220  # pixels of the longer side
TRUE_BOX, PREDICTED_BOX = (34, 139, 74), (214, 69, 65)


def results_table(results: dict[str, TaskResult]) -> str:
    """Plain text, one task a line."""
    wide = max(12, *map(len, results))
    lines = [f"{'task':<{wide}} {'accuracy':>9} {'95 % interval':>15} {'blind':>7} {'shuffled':>9} {'items':>6}"]
    for task, r in results.items():
        interval = f"{r.low:.1%}-{r.high:.1%}"
        lines.append(f"{task:<{wide}} {r.accuracy:>9.1%} {interval:>15} {r.blind:>7.1%} {r.shuffled:>9.1%} {r.n:>6}")
    return "\n".join(lines)


def depth_table(results: dict[str, TaskResult]) -> str:
    """Plain text: accuracy by the part of the context in which the earliest evidence stands, one row a line."""
    wide = max(12, *map(len, results))
    edges = [f"{100 * i // DEPTHS}-{100 * (i + 1) // DEPTHS} %" for i in range(DEPTHS)]
    lines = [f"{'depth':<{wide}} " + " ".join(f"{edge:>9}" for edge in edges)]
    for task, r in results.items():
        if r.by_depth:
            lines.append(f"{task:<{wide}} " + " ".join(f"{'-' if x is None else format(x, '.1%'):>9}" for x in r.by_depth))
    return "\n".join(lines)


def loss_curve(metrics: Sequence[dict[str, float]]) -> str:
    """SVG of the training loss over steps."""
    figure, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
    axis.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], color="#1b6ca8")
    axis.set(xlabel="step", ylabel="cross-entropy (nats per token)", yscale="log")
    axis.grid(alpha=0.3, which="both")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def cards(items: Sequence[Item], answers: Sequence[str]) -> list[dict[str, Any]]:
    """What the grid of pictures shows: boxes are drawn in, true in green and predicted in red."""
    return [
        {
            "task": item.task, "question": item.question, "answer": answer, "truth": item.answer,
            "correct": correct(item.task, answer, item.answer), "picture": data_url(_thumbnail(item, answer)),
        }
        for item, answer in zip(items, answers, strict=True)
    ]  # fmt: skip


def _thumbnail(item: Item, answer: str) -> Image.Image:
    picture = Image.fromarray(item.images[0])
    scale = max(1, THUMBNAIL // max(picture.size))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for text, colour in ((item.answer, TRUE_BOX), (answer, PREDICTED_BOX)):
        box = parse_box(text)
        if box is not None and box[0] <= box[2] and box[1] <= box[3]:
            corners = np.array(box) / 1000 * (picture.size * 2)
            draw.rectangle(tuple(np.clip(corners, 0, [s - 1 for s in picture.size * 2]).tolist()), outline=colour, width=2)
    return picture


def data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_report(path: Path, **values: Any) -> None:
    """Fills report.html; every value is escaped but the SVG made here."""
    source = resources.files("andesvl_jax.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(source)
    path.write_text(template.render(**values), encoding="utf-8")
