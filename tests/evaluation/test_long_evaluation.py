"""Long contexts in evaluation: an oracle that reads what it is shown is right, its controls are not, depths are told apart."""

import re

import numpy as np
import pytest

from andesvl_jax.data.long_context.length import prompt_tokens
from andesvl_jax.evaluation import evaluate as module
from andesvl_jax.evaluation.benchmarks import Item, blind, long_validation, shuffled
from andesvl_jax.evaluation.evaluate import evaluate
from andesvl_jax.evaluation.report import depth_table, results_table
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.tokenizer import Tokenizer

COUNT = prompt_tokens(Tokenizer.from_merges([]), ImageProcessor(patch_size=14))  # a token is a byte


@pytest.fixture(scope="module")
def items():
    return long_validation(("niah_single", "which_picture"), 600, 30, COUNT)


def test_the_benchmark_has_as_many_questions_of_every_family(items):
    assert [item.row for item in items] == ["niah_single@600"] * 30 + ["which_picture@600"] * 30
    assert all(bool(item.context) != bool(item.images) and item.depths for item in items)


def test_controls_of_long_contexts(items):
    for item in map(blind, items):
        assert item.context == "" and all(np.all(image == 128) for image in item.images)
    for item, other in zip(items, shuffled(items), strict=True):
        assert (other.row, other.question, other.answer, other.depths) == (item.row, item.question, item.answer, item.depths)
        assert other.context != item.context or other.images is not item.images


def read(item: Item) -> str:
    """A model that looks no further than the first half of the context."""
    key = re.search(r"code of (\w+)[?.]|code does (\w+)", item.question)
    seen = item.context[: len(item.context) // 2]
    found = re.search(rf"code of {key[1] or key[2]} is (\d+)", seen)
    return f"It is {found[1]}." if found else "I do not know."


def test_results_are_told_apart_by_depth(monkeypatch):
    monkeypatch.setattr(module, "answers", lambda bundle, items, **options: [read(item) for item in items])
    items = long_validation(["niah_single"], 600, 200, COUNT)
    found = evaluate(None, items)
    (row,) = found
    result = found[row]
    assert row == "niah_single@600" and result.n == 200 and result.blind == 0 and result.shuffled < 0.1
    assert result.by_depth[:1] == (1.0,) and result.by_depth[2:] == (0.0, 0.0) and 0.4 < result.accuracy < 0.6
    table = depth_table(found).splitlines()
    assert table[0].split("  ")[0] == "depth" and "100.0%" in table[1] and row in results_table(found)
