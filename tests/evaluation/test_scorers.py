"""Scores: boxes, centres, intervals, and controls that keep the questions."""

import math

import numpy as np
import pytest

from andesvl_jax.data.registry import WORDINGS
from andesvl_jax.evaluation.benchmarks import blind, nano_validation, shuffled
from andesvl_jax.evaluation.scorers import correct, iou, parse_box, score, wilson


@pytest.mark.parametrize(
    ("task", "predicted", "truth", "right"),
    [
        ("word", " Cat ", "CAT", True),
        ("count", "3.", "3", False),
        ("box", "<|box_start|>(0,0),(100,100)<|box_end|>", "<|box_start|>(0,0),(100,199)<|box_end|>", True),
        ("box", "(0,0),(100,100)", "(0,0),(100,201)", False),  # IoU just below one half
        ("grounding", "(0,0),(100,100)", "(40,40),(60,60)", True),
        ("grounding", "(0,0),(100,100)", "(51,40),(60,60)", False),
        ("grounding", "no box", "(40,40),(60,60)", False),
        ("screen_qa", "(900,900),(0,0)", "(440,440),(460,460)", True),
    ],
)
def test_one_rule_per_task(task, predicted, truth, right):
    assert correct(task, predicted, truth) is right


@pytest.mark.parametrize(
    ("task", "predicted", "truth", "expected"),
    [
        ("niah_single", "The code of lamp is 4821.", "4821", 1),
        ("niah_single", "48210", "4821", 0),
        ("niah_multivalue", "4821 and 1177", "4821, 9034, 1177, 2222", 0.5),
        ("vt", "Lamp, stones", "lamp, stone", 0.5),
        ("qa_two_hop", "She lives in ROME, I think", "Rome", 1),
        ("dialogue", "Anna: lamp; Ben: stone", "Anna: lamp; Ben: stone", 1),
        ("dialogue", " ben:  Stone\nAnna: lamp\n", "Anna: lamp; Ben: stone", 1),
        ("dialogue", "Anna: lamp", "Anna: lamp; Ben: stone", 0.5),
        ("dialogue", "Anna: lamp; Ben: stone; Carl: rope; Dora: tea", "Anna: lamp; Ben: stone", 0.5),
        ("dialogue", "", "Anna: lamp; Ben: stone", 0),
        ("pages", "BLUE BOAT", "blue boat", 1),
        ("which_picture", "3 or 4", "3", 0),
    ],
)
def test_scores_of_lists_and_facts(task, predicted, truth, expected):
    assert score(task, predicted, truth) == expected


def test_iou_of_random_boxes_equals_counting_cells():
    rng = np.random.default_rng(0)
    for _ in range(50):
        boxes = np.sort(rng.integers(0, 30, (2, 2, 2)), axis=1)  # box, corner, axis
        a, b = (tuple(int(v) for v in box.reshape(-1)) for box in boxes)
        cells = np.zeros((2, 30, 30), bool)
        for i, (x1, y1, x2, y2) in enumerate((a, b)):
            cells[i, y1:y2, x1:x2] = True
        union = (cells[0] | cells[1]).sum()
        assert iou(a, b) == pytest.approx((cells[0] & cells[1]).sum() / union if union else 0.0)


def test_wilson_interval_solves_its_equation():
    """Its ends p satisfy |hits/n - p| = z sqrt(p (1 - p) / n), the definition of the score interval."""
    for hits, n in ((0, 10), (3, 10), (97, 100), (100, 100)):
        for p in wilson(hits, n):
            assert abs(hits / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), abs=1e-6)


def test_controls_keep_questions_and_change_pictures():
    items = nano_validation(4)
    assert all(np.all(image == 128) for item in items for image in blind(item).images)
    mixed = shuffled(items)
    assert sorted((i.task, i.question, i.answer) for i in mixed) == sorted((i.task, i.question, i.answer) for i in items)
    originals = {(i.task, i.question, i.answer): i.images[0] for i in items}
    changed = [not np.array_equal(originals[i.task, i.question, i.answer], i.images[0]) for i in mixed]
    assert np.mean(changed) > 0.9  # two items may share a picture's pixels by chance, hardly ever more


def test_the_benchmark_has_as_many_items_of_every_task():
    items = nano_validation(5)
    counts = {task: sum(i.task == task for i in items) for task in {i.task for i in items}}
    assert set(counts) == set(WORDINGS) and set(counts.values()) == {5}


def test_a_box_is_read_from_the_format_of_the_report():
    assert parse_box("<|box_start|>(12,345),(678,910)<|box_end|>") == (12, 345, 678, 910) and parse_box("(1,2)") is None
