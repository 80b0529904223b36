"""Accuracy per task, beside a blind baseline and a shuffled-picture control on the same items."""

from dataclasses import asdict, dataclass
from typing import Any, Sequence

from tqdm import tqdm

from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.decoding.api import chat_sample, stream
from andesvl_jax.errors import UserError
from andesvl_jax.evaluation.benchmarks import Item, grey, shuffled
from andesvl_jax.evaluation.scorers import correct, wilson
from andesvl_jax.inputs.packing import Sample, bucket


@dataclass(frozen=True)
class TaskResult:
    """Accuracies in 0..1 over n items; low and high bound a 95 % interval of `accuracy`."""

    accuracy: float
    low: float
    high: float
    blind: float
    shuffled: float
    n: int


def prompt_of(bundle: Bundle, item: Item) -> Sample:
    """The item's pictures and question as the first turn of a conversation."""
    content = [{"type": "image", "image": image} for image in item.images] + [{"type": "text", "text": item.question}]
    return chat_sample(bundle, [{"role": "user", "content": content}])


def answers(bundle: Bundle, items: Sequence[Item], batch_size: int = 64, max_new_tokens: int = 32, **options: Any) -> list[str]:
    """Greedy answers, in order. Prompts are grouped by size so that a batch is one bucket; options as in `generate`."""
    if not items:
        raise UserError("the benchmark has no items, expected at least one.")
    samples = [prompt_of(bundle, item) for item in items]
    order = sorted(range(len(items)), key=lambda i: (bucket(samples[i].patches), bucket(len(samples[i].tokens)), i))
    out = [""] * len(items)
    for start in tqdm(range(0, len(items), batch_size), unit="batch", leave=False, disable=None):
        chosen = order[start : start + batch_size]
        rows = [samples[i] for i in chosen] + [samples[chosen[-1]]] * (batch_size - len(chosen))  # one shape for all batches
        *_, answer = stream(bundle, rows, max_new_tokens, **options)
        for i, ids in zip(chosen, answer.ids, strict=False):
            out[i] = bundle.tokenizer.decode([t for t in ids if t not in bundle.stop_ids], skip_special=False)
    return out


def evaluate(bundle: Bundle, items: Sequence[Item], controls: bool = True, **options: Any) -> dict[str, TaskResult]:
    """Results per task, in the order the tasks appear. Without controls their accuracies are NaN."""
    items = list(items)
    variants = {"accuracy": items}
    if controls:
        variants |= {"blind": [grey(item) for item in items], "shuffled": shuffled(items)}
    hits: dict[str, dict[str, int]] = {}
    for name, asked in variants.items():
        for item, text in zip(asked, answers(bundle, asked, **options), strict=True):
            row = hits.setdefault(item.task, dict.fromkeys(("accuracy", "blind", "shuffled"), 0))
            row[name] += correct(item.task, text, item.answer)
    results = {}
    for task, row in hits.items():
        n = sum(item.task == task for item in items)
        low, high = wilson(row["accuracy"], n)
        blind, shuffle = (row[name] / n if controls else float("nan") for name in ("blind", "shuffled"))
        results[task] = TaskResult(row["accuracy"] / n, low, high, blind, shuffle, n)
    return results


def as_json(results: dict[str, TaskResult]) -> dict[str, dict[str, float]]:
    return {task: asdict(result) for task, result in results.items()}
