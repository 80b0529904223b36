"""Properties of the packer on random streams: nothing lost, nothing twice, no budget broken, nobody starved, state exact."""

import ast
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from andesvl_jax.data import best_fit
from andesvl_jax.data.best_fit import next_row

SEEDS = range(20)


def stream(rng, count, budgets):
    """Items with sizes from nothing to a whole row, heavy-tailed, in budgets of their own."""
    shares = rng.beta(0.6, 3.0, (count, len(budgets)))
    return [(i, tuple(int(s) for s in np.rint(share * budgets))) for i, share in enumerate(shares)]


def rows_of(items, budgets, look_ahead):
    waiting, draws = {}, iter(items)
    return list(iter(lambda: next_row(waiting, draws, budgets, look_ahead), [])), waiting


@pytest.mark.parametrize("seed", SEEDS)
def test_every_item_is_placed_once_within_the_budgets_and_after_a_bounded_wait(seed):
    rng = np.random.default_rng(seed)
    budgets = tuple(int(b) for b in rng.integers(1, 300, rng.integers(1, 4)))
    look_ahead = int(rng.integers(1, 20))
    items = stream(rng, 200, budgets)
    rows, waiting = rows_of(items, budgets, look_ahead)
    assert not waiting and sorted(itertools.chain(*rows)) == list(range(200))
    sizes = dict(items)
    for row in rows:
        assert all(sum(sizes[key][d] for key in row) <= budget for d, budget in enumerate(budgets))
    # when a row starts, everything before its first item has been placed: the oldest always comes first
    placed: set[int] = set()
    for row in rows:
        assert row[0] == min(set(range(200)) - placed)
        placed |= set(row)
        assert max(placed) < row[0] + len(placed) + look_ahead, "it looks no further ahead than it may"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_row_is_closed_only_when_nothing_that_waits_fits(seed):
    rng = np.random.default_rng(seed)
    budgets = (90, 50)
    items = stream(rng, 80, budgets)
    waiting, draws, sizes = {}, iter(items), dict(items)
    while row := next_row(waiting, draws, budgets, 6):
        left = [budget - sum(sizes[key][d] for key in row) for d, budget in enumerate(budgets)]
        assert not any(all(s <= room for s, room in zip(size, left, strict=True)) for size in waiting.values())


@pytest.mark.parametrize("seed", SEEDS)
def test_the_rows_after_a_restore_are_those_without_it(seed):
    rng = np.random.default_rng(seed)
    items = stream(rng, 120, (64, 32))
    waiting, drawn = {}, iter(items)
    for _ in range(int(rng.integers(0, 10))):
        next_row(waiting, drawn, (64, 32), 8)
    keys, rest = list(waiting), list(drawn)  # the whole state
    again = {key: dict(items)[key] for key in keys}
    a, b = iter(rest), iter(rest)
    for _ in range(20):
        assert next_row(waiting, a, (64, 32), 8) == next_row(again, b, (64, 32), 8)


def test_a_heavy_tailed_stream_fills_its_tightest_budget():
    rng = np.random.default_rng(0)
    tokens = np.minimum(np.exp(rng.normal(5.5, 1.3, 3000)) + 16, 4096).astype(int)
    patches = np.where(rng.random(3000) < 0.7, np.minimum(np.exp(rng.normal(6, 1, 3000)), 8192), 0).astype(int)
    sizes = np.stack([tokens, patches], 1)
    rows, _ = rows_of(list(enumerate(map(tuple, sizes.tolist()))), (4096, 8192), 32)
    fill = np.mean([sizes[row].sum(0) / (4096, 8192) for row in rows[:-5]], axis=0)  # the last rows have no choice left
    assert fill.max() > 0.98


def test_an_item_that_no_row_holds_is_refused():
    with pytest.raises(ValueError, match=r"item 'a' has sizes \(3, 9\), expected at most \(4, 8\)"):
        next_row({}, iter([("a", (3, 9))]), (4, 8), 2)


def test_the_module_can_be_lifted_out():
    tree = ast.parse(Path(best_fit.__file__).read_text())
    imported = {getattr(node, "module", None) or node.names[0].name for node in ast.walk(tree) if hasattr(node, "names")}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names
