"""Benchmarks: lists of single questions about pictures, with the true answers."""

import itertools
from dataclasses import dataclass

import numpy as np

from andesvl_jax.data.registry import TASKS, WORDINGS, render

VALIDATION_SEED = 20_000


@dataclass(frozen=True)
class Item:
    """One question, asked alone: pictures uint8 [H, W, 3]; `task` selects the scorer."""

    task: str
    images: tuple[np.ndarray, ...]
    question: str
    answer: str


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


def grey(item: Item) -> Item:
    """The blind control: the same picture sizes, nothing on them."""
    return Item(item.task, tuple(np.full_like(image, 128) for image in item.images), item.question, item.answer)


def shuffled(items: list[Item]) -> list[Item]:
    """The second control: every item gets the pictures of the next item of its task."""
    out = []
    for _, group in itertools.groupby(sorted(items, key=lambda i: i.task), key=lambda i: i.task):
        group = list(group)
        out += [Item(a.task, b.images, a.question, a.answer) for a, b in zip(group, group[1:] + group[:1], strict=True)]
    return out
