"""A model that ships, from nothing to its card: tokenizer, six stages, evaluation beside controls, weights in bfloat16.

Commands:

    andesvl prepare real --out out/real
    python experiments/nano.py                         # or nano-siglip; goes on where an interrupted run ended
    python experiments/nano.py --set steps=50 --out out/try --results out/try/results.json     # ships nothing
    python experiments/nano.py --runs out/look-up out/sft --ship     # runs made elsewhere, which began with the model that ships

Stages and mixtures are those of configs/stages.py. Writes results/nano.json, and with `--ship` andesvl_jax/shipped/nano.
"""

import argparse
import json
import re
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from matplotlib import pyplot as plt

from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.checkpoints.hf import load, save
from andesvl_jax.checkpoints.locate import SHIPPED
from andesvl_jax.cli import RETRIEVAL_TOKENS
from andesvl_jax.compression.accounting import describe_checkpoint
from andesvl_jax.data.corpus import ADDED_NAME, corpus, lower_capital_runs, source_text, train_tokenizer
from andesvl_jax.data.long_context.registry import TEXT_TASKS, render_long
from andesvl_jax.evaluation.benchmarks import NANO_TARGETS, VALIDATION_SEED, Item, nano_validation, real_validation
from andesvl_jax.evaluation.evaluate import RETRIEVAL, answers, as_json, evaluate, evaluate_long
from andesvl_jax.evaluation.report import loss_curve, results_table
from andesvl_jax.evaluation.scorers import score
from andesvl_jax.inputs.tokenizer import ADDED_TOKENS
from andesvl_jax.training.config import load_config
from andesvl_jax.training.loop import train
from andesvl_jax.training.metrics import environment, read_metrics

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("alignment", "joint", "multi-task", "print", "look-up", "sft")
LONG_EXAMPLES, LONG_CHARACTERS = 60, 2048  # of each long-context family in the tokenizer's corpus
FILE_EXAMPLES = 4000
REAL = Path("out/real")
SMOOTHED = 5  # lines of metrics that the loss at the end of a stage is the mean of
FAILURE_ITEMS = 20  # questions of a task that one wrong answer is looked for in
SHOWN = ("", "gui")  # sources whose pictures may be shown: rendered here, and under the MIT licence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="nano", choices=("nano", "nano-siglip"))
    parser.add_argument("--out", type=Path, help="run directory (default: out/MODEL)")
    parser.add_argument("--results", type=Path, help="JSON file to write (default: results/MODEL.json)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field of every stage")
    parser.add_argument("--runs", nargs="+", type=Path, help="make the card of these run directories, in order; train nothing")
    parser.add_argument("--per-task", type=int, default=500)
    parser.add_argument("--ship", action="store_true", help="put weights and card in the package")
    args = parser.parse_args()
    out = args.out or Path("out") / args.model
    results = args.results or ROOT / "results" / f"{args.model}.json"

    runs = args.runs or train_stages(args.model, out, args.set)
    shipped = SHIPPED / args.model if args.ship else out / "shipped"
    save(load(runs[-1] / "model", dtype="bfloat16"), shipped)
    stages = [stage_record(run) for run in runs]
    stages = earlier_stages(runs[0], args.model, stages) + stages
    record = {"model": args.model, "stages": stages, "environment": environment(), **measure(load(shipped), REAL, args.per_task)}
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_card(record, shipped, REAL)


def tokenizer_text(files: Sequence[str]) -> Iterator[str]:
    """Rendered questions and general English, long contexts, and the questions and answers of `files`."""
    yield from corpus(0)
    for family in TEXT_TASKS:
        for index in range(LONG_EXAMPLES):
            example = render_long(family, 0, index, "train", LONG_CHARACTERS, lambda sketch: len(sketch.context))
            yield lower_capital_runs(example.context)
            yield from (lower_capital_runs(f"{turn.question}\n{turn.answer}\n") for turn in example.turns)
    yield from source_text(files, FILE_EXAMPLES)


def train_stages(model: str, out: Path, changes: Sequence[str]) -> list[Path]:
    """Runs what is not finished of the six stages; returns their run directories."""
    out.mkdir(parents=True, exist_ok=True)
    configs = {name: load_config(f"{ROOT}/configs/stages.py:{model}/{name}", changes) for name in STAGES}
    if not (out / "tokenizer.json").is_file():
        joint = configs["joint"]
        size = joint.model.text.vocab_size - len(ADDED_TOKENS)
        train_tokenizer(tokenizer_text(list(joint.data.files.values())), out / "tokenizer.json", size)
    start = None
    for name, config in configs.items():
        if not (out / name / "model" / "config.json").is_file():
            config = replace(config, init_from=start, tokenizer=str(out))
            train(config, out / name, resume="auto", command=shlex.join(["python", *sys.argv]))
        start = str(out / name / "model")
    return [out / name for name in STAGES]


def earlier_stages(run: Path, model: str, stages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the record of the model that ships says of its stages, if `run` began with that model; without `stages` themselves."""
    begun = json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]["init_from"]
    if begun != model:
        return []
    record = json.loads((ROOT / "results" / f"{model}.json").read_text(encoding="utf-8"))
    return [stage for stage in record["stages"] if stage not in stages]


def stage_record(run: Path) -> dict[str, Any]:
    """What a run did, from its own record and metrics: steps done and planned, rate, rows, tokens, seconds, loss and data."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    config = record["config"]
    metrics = read_metrics(run)
    last, every = metrics[-1], max(1, len(metrics) // 100)
    budget, optimizer = config["budget"], config["optimizer"]
    return {
        "rows": budget["rows"], "row_tokens": budget["tokens"],
        "rate": optimizer["decoder"], "final": optimizer["final_fraction"],
        "name": re.sub(r"^\d+[a-z]?-", "", run.name), "steps": last["step"], "planned": config["steps"],
        "tokens": round(sum(m["tokens"] for m in metrics) / len(metrics) * last["step"]), "seconds": round(last["seconds"]),
        "loss": sum(m["loss"] for m in metrics[-SMOOTHED:]) / len(metrics[-SMOOTHED:]), "seed": config["data"]["seed"],
        "devices": record["environment"]["devices"], "weights": config["data"]["weights"], "limits": config["data"]["limits"],
        "curve": [[m["step"], round(m["loss"], 4)] for m in metrics[::every]],
    }  # fmt: skip


def measure(bundle: Bundle, real: Path, per_task: int) -> dict[str, Any]:
    """What `andesvl evaluate --benchmark nano-val` prints, and the largest picture of the model in pixels each way."""
    began = time.perf_counter()
    results = evaluate(bundle, nano_validation(per_task) + (real_validation(real, per_task) if real.is_dir() else []))
    results |= evaluate_long(bundle, RETRIEVAL, RETRIEVAL_TOKENS, per_task)
    print(results_table(results))
    size = bundle.image_processor.max_size
    return {"max_size": size, "per_task": per_task, "seconds": round(time.perf_counter() - began), "tasks": as_json(results)}


def write_card(record: dict[str, Any], shipped: Path, real: Path) -> None:
    """The model card, with the loss curve and known failures as pictures beside it."""
    curve, before = [], 0
    for stage in record["stages"]:
        curve += [{"step": step + before, "loss": loss} for step, loss in stage["curve"]]
        before += stage["steps"]
    (shipped / "loss.svg").write_text(loss_curve(curve), encoding="utf-8")
    draw_failures(load(shipped), real, shipped / "failures.png")
    (shipped / "README.md").write_text(card(record, describe_checkpoint(str(shipped))), encoding="utf-8")


def card(record: dict[str, Any], info: dict[str, Any]) -> str:
    """Markdown of the model card; info is that of `describe_checkpoint`."""
    template = (Path(__file__).parent / "nano_card.md.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    ).from_string(template)
    return page.render(**record, info=info, targets=NANO_TARGETS)


def draw_failures(bundle: Bundle, real: Path, path: Path) -> None:
    """One wrong answer of every task that has one, of pictures that may be shown."""
    items = nano_validation(FAILURE_ITEMS, seed=VALIDATION_SEED + 1)
    items += [item for item in real_validation(real, FAILURE_ITEMS) if item.source in SHOWN]
    wrong: dict[str, tuple[Item, str]] = {}
    for item, text in zip(items, answers(bundle, items), strict=True):
        if score(item.task, text, item.answer) < 1 and item.question.isascii():  # what matplotlib's own font can write
            wrong.setdefault(item.row, (item, text))
    columns = 4
    rows = -(-len(wrong) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(11, 3.1 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (row, (item, text)) in zip(axes.flat, wrong.items(), strict=False):
        axis.imshow(item.images[0], interpolation="nearest")
        lines = (row, item.question, f"said: {text}", f"true: {item.answer}")
        axis.set_title("\n".join(textwrap.fill(plain(line), 38) for line in lines), fontsize=7, loc="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plain(text: str) -> str:
    """Without the names of added tokens, and with nothing that matplotlib reads as mathematics."""
    return ADDED_NAME.sub("", text).replace("$", r"\$")


if __name__ == "__main__":
    main()
