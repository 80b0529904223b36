"""Benchmarks: lists of single questions about pictures and texts, with the true answers."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from andesvl_jax.data.long_context.layout import Count
from andesvl_jax.data.long_context.registry import LENGTH_MARK, render_long
from andesvl_jax.data.registry import TASKS, WORDINGS, render

VALIDATION_SEED = 20_000


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

    @property
    def row(self) -> str:
        """The name of the row of the results table it counts in."""
        return f"{self.task}{LENGTH_MARK}{self.tokens}" if self.tokens else self.task


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
