"""Accuracy per task, beside a blind baseline and a shuffled control on the same items."""

from dataclasses import asdict, dataclass
from typing import Any, Sequence

from tqdm import tqdm

from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.data.long_context.length import prompt_tokens
from andesvl_jax.data.long_context.registry import LENGTH_MARK, TEXT_TASKS
from andesvl_jax.decoding.api import chat_sample, stream
from andesvl_jax.errors import UserError
from andesvl_jax.evaluation.benchmarks import Item, blind, long_validation, shuffled
from andesvl_jax.evaluation.scorers import score, wilson
from andesvl_jax.inputs.packing import Sample, bucket

VARIANTS = ("accuracy", "blind", "shuffled")
BATCH_SIZE = 64  # rows
BATCH_TOKENS = 16_384  # of the prompts of a batch, where they are long
LONG_ANSWER = 48  # tokens; the longest answer has fewer in a vocabulary of 4,096
RETRIEVAL = ("niah_single",)  # long-context families of nano's benchmark
DEPTHS = 4  # equal parts of a context that results are shown for


@dataclass(frozen=True)
class TaskResult:
    """Accuracies in 0..1 over n items; low and high bound a 95 % interval of `accuracy`.

    by_depth: in rows of a length, accuracy of the items whose earliest evidence is in each quarter of the context; None: no item.
    """

    accuracy: float
    low: float
    high: float
    blind: float
    shuffled: float
    n: int
    by_depth: tuple[float | None, ...] = ()


def prompt_of(bundle: Bundle, item: Item) -> Sample:
    """The item's pictures, context and question as the first turn of a conversation."""
    text = {"type": "text", "text": item.context + item.question}
    content = [{"type": "image", "image": image} for image in item.images] + [text]
    return chat_sample(bundle, [{"role": "user", "content": content}])


def answers(
    bundle: Bundle, items: Sequence[Item], batch_size: int = BATCH_SIZE, max_new_tokens: int = 32, **options: Any
) -> list[str]:
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
    """Results per row of the table, in the order the rows appear. Without controls their accuracies are NaN.

    Items of a length are also told apart by the depth of the earliest thing that answers them.
    """
    items = list(items)
    variants = {"accuracy": items}
    if controls:
        variants |= {"blind": [blind(item) for item in items], "shuffled": shuffled(items)}
    scores: dict[str, dict[str, list[float]]] = {}
    depths: dict[str, list[float | None]] = {}
    for name, asked in variants.items():
        for item, text in zip(asked, answers(bundle, asked, **options), strict=True):
            scores.setdefault(item.row, {}).setdefault(name, []).append(score(item.task, text, item.answer))
    for item in items:
        depths.setdefault(item.row, []).append(min(item.depths, default=None))
    return {row: _result(found, depths[row]) for row, found in scores.items()}


def _result(scores: dict[str, list[float]], depths: list[float | None]) -> TaskResult:
    n = len(depths)
    low, high = wilson(sum(scores["accuracy"]), n)
    accuracy, blind_, shuffled_ = (sum(scores[name]) / n if name in scores else float("nan") for name in VARIANTS)
    by_depth = [[] for _ in range(DEPTHS)]
    for found, depth in zip(scores["accuracy"], depths, strict=True):
        if depth is not None:
            by_depth[min(int(depth * DEPTHS), DEPTHS - 1)].append(found)
    means = tuple(sum(part) / len(part) if part else None for part in by_depth) if any(by_depth) else ()
    return TaskResult(accuracy, low, high, blind_, shuffled_, n, means)


def evaluate_long(
    bundle: Bundle, families: Sequence[str] | None, lengths: Sequence[int], per_task: int, **options: Any
) -> dict[str, TaskResult]:
    """Results of long-context families (None: those of text) at several lengths of the prompt, batches of about one size.

    Raises UserError for a family or a length that there is not.
    """
    if bundle.tokenizer is None:
        raise UserError("the model has no tokenizer.json, expected one: lengths are counted in its tokens.")
    count = prompt_tokens(bundle.tokenizer, bundle.image_processor)
    results = {}
    for tokens in lengths:
        items = long_validation(families or TEXT_TASKS, tokens, per_task, count)
        rows = max(1, min(BATCH_TOKENS // tokens, BATCH_SIZE, len(items)))
        results |= evaluate(bundle, items, batch_size=rows, max_new_tokens=LONG_ANSWER, **options)
    order = {name: i for i, name in enumerate(dict.fromkeys(row.partition(LENGTH_MARK)[0] for row in results))}
    return dict(sorted(results.items(), key=lambda entry: order[entry[0].partition(LENGTH_MARK)[0]]))


def as_json(results: dict[str, TaskResult]) -> dict[str, dict[str, float]]:
    return {task: asdict(result) for task, result in results.items()}
