"""Best-fit packing with look-ahead, under any number of budgets at once (here: tokens, patches and targets of a row).

Plain Python without imports from the rest of the project: copy this file to use it elsewhere. It knows items by a key and their
sizes alone, so an item may be anything that must stay whole: one conversation, or the two answers of a preference pair.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Sizes = Sequence[int]


def next_row(
    waiting: dict[Key, Sizes], draws: Iterator[tuple[Key, Sizes]], budgets: Sizes, look_ahead: int
) -> list[Key]:  # fmt: skip
    """Chooses the items of the next row.

    The row starts with the item that has waited longest, so that none waits for more than `look_ahead` rows; then the largest
    waiting item that still fits joins it, until none fits. Large is the sum of the shares that an item takes of the budgets.

    Args:
      waiting: sizes of the items drawn but not placed, oldest first; changed in place. Its keys and the place of `draws` are the
        whole state: with both restored the rows go on as if never interrupted.
      draws: further items, endless or not; as many are taken as keep `look_ahead` items waiting.
      budgets: largest sum of each size in a row; a budget of 0 holds only items of size 0.
      look_ahead: number of items to choose from, at least 1.
    Returns:
      keys in the order of placing; empty when nothing is left.
    Raises:
      ValueError: an item that no empty row holds.
    """
    row: list[Key] = []
    left = list(budgets)
    while True:
        while len(waiting) < look_ahead and (drawn := next(draws, None)) is not None:
            key, sizes = drawn
            if not _fits(sizes, budgets):
                raise ValueError(f"item {key!r} has sizes {tuple(sizes)}, expected at most {tuple(budgets)}.")
            waiting[key] = sizes
        fitting = [key for key, sizes in waiting.items() if _fits(sizes, left)]
        if not fitting:
            return row
        chosen = max(fitting, key=lambda key: _share(waiting[key], budgets)) if row else fitting[0]
        left = [room - size for room, size in zip(left, waiting.pop(chosen), strict=True)]
        row.append(chosen)


def _fits(sizes: Sizes, room: Sizes) -> bool:
    return all(size <= space for size, space in zip(sizes, room, strict=True))


def _share(sizes: Sizes, budgets: Sizes) -> float:
    return sum(size / budget for size, budget in zip(sizes, budgets, strict=True) if budget)
