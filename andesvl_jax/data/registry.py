"""The task families by name, and the one entry point that renders an example of them."""

import zlib
from collections.abc import Callable

import numpy as np

from andesvl_jax.data import tasks_chart, tasks_digits, tasks_page, tasks_print, tasks_screen, tasks_shapes, tasks_text
from andesvl_jax.data.examples import MANY, SPLITS, Example, in_validation
from andesvl_jax.errors import UserError

__all__ = ["SPLITS", "TASKS", "WORDINGS", "in_validation", "render"]

TASKS: dict[str, Callable[[np.random.Generator, str, int], Example]] = {
    "shapes": tasks_shapes.render_shapes,
    "pair": tasks_shapes.render_pair,
    "word": tasks_text.render_word,
    "number": tasks_text.render_number,
    "handwritten": tasks_digits.render_handwritten,
    "chart": tasks_chart.render_chart,
    "screen": tasks_screen.render_screen,
    "widget": tasks_screen.render_widget,
    "lines": tasks_print.render_lines,
    "page": tasks_page.render_page,
}
WORDINGS: dict[str, tuple[str, ...]] = {
    task: wordings
    for module in (tasks_shapes, tasks_text, tasks_digits, tasks_chart, tasks_screen, tasks_print, tasks_page)
    for task, wordings in module.WORDINGS.items()
}


def render(family: str, seed: int, index: int, split: str, crowd: int = MANY) -> Example:
    """Example `index` of a family: a pure function of its arguments, with at most `crowd` shapes, bars or widgets in it.

    Raises UserError for a family that is not in TASKS or a split that is not in SPLITS.
    """
    if family not in TASKS:
        raise UserError(f"task family: found {family!r}, expected one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise UserError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, index, zlib.crc32(family.encode()), SPLITS.index(split)])
    return TASKS[family](rng, split, crowd)
