"""Benchmarks: lists of single questions about pictures and texts, with the true answers."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from andesvl_jax.data.long_context.layout import Count
from andesvl_jax.data.long_context.registry import LENGTH_MARK, render_long
from andesvl_jax.data.registry import TASKS, WORDINGS, render
from andesvl_jax.data.tar import TarShard
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.chat import Message

VALIDATION_SEED = 20_000
NANO_TARGETS = {  # accuracies that `nano` is meant to reach; every rendered task also 0.3 above blind
    "count": 0.95, "colour": 0.95, "position": 0.95, "word": 0.9, "handwritten": 0.95, "gui/grounding": 0.6,
    "niah_single@2048": 0.95,
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One question, asked alone: pictures uint8 [H, W, 3]; `task` selects the scorer.

    context: text between pictures and question. tokens: length that was asked for, 0 if none was. depths: where in that length
    what answers the question begins, 0..1 each.
    """

    task: str
    images: tuple[np.ndarray, ...]
    question: str
    answer: str
    context: str = ""
    tokens: int = 0
    depths: tuple[float, ...] = ()
    source: str = ""  # of real pictures

    @property
    def row(self) -> str:
        """The name of the row of the results table it counts in."""
        name = f"{self.source}/{self.task}" if self.source else self.task
        return f"{name}{LENGTH_MARK}{self.tokens}" if self.tokens else name


def nano_validation(per_task: int, seed: int = VALIDATION_SEED) -> list[Item]:
    """`per_task` questions of every task of the renderers, on validation content that training never shows."""
    found: dict[str, list[Item]] = {task: [] for task in WORDINGS}
    for family in TASKS:
        tasks: set[str] = set()
        for index in itertools.count():
            example = render(family, seed, index, "validation")
            tasks |= {turn.task for turn in example.turns}
            asked: set[str] = set()
            for turn in example.turns:
                if turn.task not in asked and len(found[turn.task]) < per_task:  # one question a task and picture
                    found[turn.task].append(Item(turn.task, example.images, turn.question, turn.answer))
                    asked.add(turn.task)
            if index > 20 and all(len(found[task]) >= per_task for task in tasks):
                break
    return [item for items in found.values() for item in items]


def real_validation(folder: str | Path, per_task: int, seed: int = VALIDATION_SEED) -> list[Item]:
    """Up to `per_task` questions of every task of the sources below `folder` (`andesvl prepare real`), one a task and picture.

    Raises UserError for a folder without such a source, or a source that is damaged.
    """
    shards = sorted(Path(folder).glob("*/validation.tar"))
    if not shards:
        raise UserError(f"{folder}: found no SOURCE/validation.tar, expected the --out of andesvl prepare real.")
    found: dict[tuple[str, str], list[Item]] = {}
    for path in shards:
        shard, source = TarShard(path), path.parent.name
        for index in np.random.default_rng(seed).permutation(len(shard)).tolist():
            tasks = shard.record(index).get("tasks")
            if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
                raise UserError(f"{path}: sample {index + 1} names no tasks, expected the --out of andesvl prepare real.")
            wanted = {task for task in tasks if len(found.setdefault((source, task), [])) < per_task}
            for task, item in zip(tasks, _items(shard[index], source, tasks) if wanted else (), strict=False):
                if task in wanted:
                    found[source, task].append(item)
                    wanted.remove(task)  # the next picture
    return [item for items in found.values() for item in items]


def _items(messages: Sequence[Message], source: str, tasks: Sequence[str]) -> list[Item]:
    """The turns of a conversation about its pictures, each as a question of its own."""
    parts = [part for message in messages for part in message["content"]]
    images = tuple(np.asarray(part["image"]) for part in parts if part["type"] == "image")
    texts = ["".join(part["text"] for part in message["content"] if part["type"] == "text") for message in messages]
    turns = zip(tasks, texts[::2], texts[1::2], strict=True)
    return [Item(task, images, question, answer, source=source) for task, question, answer in turns]


def long_validation(families: Sequence[str], tokens: int, per_task: int, count: Count, seed: int = VALIDATION_SEED) -> list[Item]:
    """`per_task` questions of each long-context family at a length, every question of a context until there are enough.

    Raises UserError as `render_long` does.
    """
    found = []
    for family in families:
        items = (
            Item(turn.task, example.images, turn.question, turn.answer, example.context, tokens, turn.depths)
            for example in (render_long(family, seed, index, "validation", tokens, count) for index in itertools.count())
            for turn in example.turns
        )
        found += itertools.islice(items, per_task)
    return found


def blind(item: Item) -> Item:
    """The first control: the same picture sizes, nothing on them, and no context."""
    return replace(item, images=tuple(np.full_like(image, 128) for image in item.images), context="")


def shuffled(items: list[Item]) -> list[Item]:
    """The second control: every item gets the pictures and the context of the next item of its row that has others."""
    out = []
    for _, group in itertools.groupby(sorted(items, key=lambda i: i.row), key=lambda i: i.row):
        group = list(group)
        for number, item in enumerate(group):
            later = group[number + 1 :] + group[:number]
            other = next((other for other in later if _shown(other) != _shown(item)), item)
            out.append(replace(item, images=other.images, context=other.context))
    return out


def _shown(item: Item) -> tuple[list[int], str]:
    return [id(image) for image in item.images], item.context
