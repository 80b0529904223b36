"""The task families by name, and the one entry point that renders an example of them."""

import functools
import zlib
from collections.abc import Callable

import numpy as np

from andesvl_jax.data import tasks_chart, tasks_digits, tasks_screen, tasks_shapes, tasks_text
from andesvl_jax.data.examples import Example, in_validation
from andesvl_jax.errors import UserError

__all__ = ["EXERCISES", "SPLITS", "TASKS", "WORDINGS", "in_validation", "render"]

SPLITS = ("train", "validation")
Renderer = Callable[[np.random.Generator, str], Example]
TASKS: dict[str, Renderer] = {
    "shapes": tasks_shapes.render_shapes,
    "word": tasks_text.render_word,
    "number": tasks_text.render_number,
    "handwritten": tasks_digits.render_handwritten,
    "chart": tasks_chart.render_chart,
    "screen": tasks_screen.render_screen,
}
EXERCISES: dict[str, Renderer] = {  # for training alone: whole pictures told, and questions of one task
    "shapes_told": tasks_shapes.tell_shapes,
    "chart_told": tasks_chart.tell_chart,
    "screen_told": tasks_screen.tell_screen,
} | {task: functools.partial(tasks_shapes.render_shapes, tasks=(task,)) for task in tasks_shapes.WORDINGS}
WORDINGS: dict[str, tuple[str, ...]] = {
    task: wordings
    for module in (tasks_shapes, tasks_text, tasks_digits, tasks_chart, tasks_screen)
    for task, wordings in module.WORDINGS.items()
}


def render(family: str, seed: int, index: int, split: str) -> Example:
    """Example `index` of a family: a pure function of its arguments.

    Raises UserError for a family that is in neither TASKS nor EXERCISES, or a split that is not in SPLITS.
    """
    families = TASKS | EXERCISES
    if family not in families:
        raise UserError(f"task family: found {family!r}, expected one of {', '.join(families)}")
    if split not in SPLITS:
        raise UserError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, index, zlib.crc32(family.encode()), SPLITS.index(split)])
    return families[family](rng, split)
