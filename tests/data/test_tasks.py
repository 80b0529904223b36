"""The task renderers: purity, the split by content, sound answers, and no answer that can be guessed."""

import functools
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from andesvl_jax.data import tasks_chart, tasks_digits, tasks_print, tasks_screen, tasks_shapes
from andesvl_jax.data.drawing import TOKEN_SIDE, print_mask, text_mask
from andesvl_jax.data.examples import LISTED_ALONE, Example
from andesvl_jax.data.registry import SPLITS, TASKS, WORDINGS, in_validation, render
from andesvl_jax.errors import UserError

SEED = 11
COUNT = {"train": 1200, "validation": 600}
TASK_NAMES = {
    "count",
    "colour",
    "position",
    "box",
    "word",
    "number",
    "handwritten",
    "chart",
    "referring",
    "grounding",
    "screen_qa",
    "shape",
    "thing",
    "scene",
    "bars",
    "labels",
    "line",
    "lines",
    "page_referring",
    "page_grounding",
}
BOX = re.compile(r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>")
LARGEST_MAJORITY = {
    "count": 0.25,
    "colour": 0.22,
    "position": 0.2,
    "box": 0.02,
    "word": 0.06,
    "number": 0.08,
    "handwritten": 0.18,
    "chart": 0.14,
    "referring": 0.11,
    "grounding": 0.02,
    "screen_qa": 0.02,
    "shape": 0.28,
    "thing": 0.06,
    "scene": 0.02,
    "bars": 0.02,
    "labels": 0.02,
    "line": 0.02,
    "lines": 0.02,
    "page_referring": 0.02,
    "page_grounding": 0.02,
}
LARGEST = {"lines": 279, "page": 279}  # pixels; 139 elsewhere


@functools.cache
def examples(family: str, split: str) -> tuple[Example, ...]:
    return tuple(render(family, SEED, index, split) for index in range(COUNT[split]))


def turns(split: str):
    return [turn for family in TASKS for example in examples(family, split) for turn in example.turns]


def box_of(text: str) -> tuple[int, ...]:
    return tuple(int(edge) for edge in BOX.search(text).groups())


@pytest.mark.parametrize("family", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_render_is_a_pure_function_of_its_arguments(family, split):
    first = [render(family, SEED, index, split) for index in range(20)]
    again = [render(family, SEED, index, split) for index in reversed(range(20))][::-1]
    for one, other in zip(first, again, strict=True):
        assert one.turns == other.turns and one.content == other.content
        assert all(a.tobytes() == b.tobytes() for a, b in zip(one.images, other.images, strict=True))
    assert render(family, SEED + 1, 0, split).images[0].tobytes() != first[0].images[0].tobytes()


@pytest.mark.parametrize("family", TASKS)
def test_contents_of_the_splits_are_disjoint(family):
    contents = {split: {example.content for example in examples(family, split)} for split in SPLITS}
    assert len(contents["validation"]) >= 100
    assert contents["train"].isdisjoint(contents["validation"])
    if family != "handwritten":
        assert not any(map(in_validation, contents["train"])) and all(map(in_validation, contents["validation"]))


def test_text_of_two_characters_or_more_never_crosses_the_split():
    answers = {
        split: {
            turn.answer
            for family in ("word", "number")
            for example in examples(family, split)
            for turn in example.turns
            if len(turn.answer) > 1
        }
        for split in SPLITS
    }
    assert answers["train"].isdisjoint(answers["validation"])


def test_a_tenth_of_contents_is_validation():
    share = np.mean([in_validation(f"content {index}") for index in range(5000)])
    assert 0.085 < share < 0.115


def test_sealed_handwritten_digits_are_never_loaded():
    images, labels = tasks_digits.load_usable_digits()
    assert len(images) == len(labels) == tasks_digits.USABLE == 898
    index = {split: [int(example.content.split()[1]) for example in examples("handwritten", split)] for split in SPLITS}
    assert max(index["train"]) < tasks_digits.TRAINING <= min(index["validation"])
    assert max(index["validation"]) < 898


@pytest.mark.parametrize("family", TASKS)
def test_pictures_are_small_rgb_and_one_pixel_short_of_whole_tokens_where_it_matters(family):
    sizes = set()
    for split in SPLITS:
        for example in examples(family, split):
            (picture,) = example.images
            assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
            height, width = picture.shape[:2]
            most = LARGEST.get(family, 139)
            assert 24 <= height <= most and 24 <= width <= most
            assert family == "handwritten" or (height % TOKEN_SIDE == width % TOKEN_SIDE == TOKEN_SIDE - 1)
            assert 1 <= len(example.turns) <= 6
            assert picture.max() > picture.min()
            sizes.add((width, height))
    assert len(sizes) >= (1 if family in ("screen", "widget") else 2)


def test_every_task_has_five_wordings_and_uses_them_all():
    assert set(WORDINGS) == TASK_NAMES
    patterns = {
        task: [re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(wording))) for wording in wordings]
        for task, wordings in WORDINGS.items()
    }
    for split in SPLITS:
        asked = defaultdict(set)
        for turn in turns(split):
            asked[turn.task].add(turn.question)
        for task, wordings in patterns.items():
            assert len(wordings) >= 5
            assert all(any(wording.fullmatch(question) for question in asked[task]) for wording in wordings), task


@pytest.mark.parametrize("split", SPLITS)
def test_no_answer_is_common_enough_to_be_guessed(split):
    answers = defaultdict(Counter)
    for turn in turns(split):
        answers[turn.task][turn.answer] += 1
    assert set(answers) == TASK_NAMES
    for task, counts in answers.items():
        assert counts.most_common(1)[0][1] / counts.total() < LARGEST_MAJORITY[task], (task, counts.most_common(3))


@pytest.mark.parametrize("task", ["box", "grounding", "screen_qa"])
def test_boxes_parse_and_no_fixed_point_hits_many_of_them(task):
    family = "shapes" if task == "box" else "screen"
    boxes = np.array(
        [box_of(turn.answer) for example in examples(family, "train") for turn in example.turns if turn.task == task]
    )
    assert (boxes >= 0).all() and (boxes <= 1000).all() and (boxes[:, :2] < boxes[:, 2:]).all()
    points = np.arange(20, 1000, 20)
    inside_x = (boxes[:, :1] <= points) & (points <= boxes[:, 2:3])
    inside_y = (boxes[:, 1:2] <= points) & (points <= boxes[:, 3:])
    assert (inside_x[:, :, None] & inside_y[:, None, :]).mean(0).max() < 0.29  # four rows of widgets: a quarter and a little


def test_shape_boxes_are_the_painted_pixels_and_lie_in_their_cell():
    rng = np.random.default_rng(SEED)
    for _ in range(200):
        scene = tasks_shapes.draw_scene(rng)
        for thing in scene.things:
            image = Image.new("RGB", (TOKEN_SIDE * scene.cells - 1,) * 2)
            box = tasks_shapes.paint(rng, scene.cells, thing, image)
            assert image.convert("L").point(lambda level: 255 * (level > 0)).getbbox() == box
            corners = [(box[0] // TOKEN_SIDE, box[1] // TOKEN_SIDE), ((box[2] - 1) // TOKEN_SIDE, (box[3] - 1) // TOKEN_SIDE)]
            assert corners == [(thing.cell % scene.cells, thing.cell // scene.cells)] * 2
        assert len({thing.cell for thing in scene.things}) == len(scene.things), "things of a scene do not overlap"


def test_counts_and_colours_agree_with_the_content():
    for example in (*examples("shapes", "train"), *examples("pair", "train")):
        things = example.content.partition(": ")[2].split("; ")
        for turn in example.turns:
            if turn.task == "count":
                assert turn.answer == str(len(things))
            if turn.task == "position":
                named = [t for t in things if " ".join(t.split()[:2]) in turn.question]
                assert [" ".join(t.split()[2:]) for t in named] == [turn.answer]
            if turn.task == "thing":
                place = re.search(r"at the ([a-z ]+?)(?: there is what)?[?.]", turn.question, re.I).group(1)
                assert [" ".join(t.split()[:2]) for t in things if " ".join(t.split()[2:]) == place] == [turn.answer]
            if turn.task in ("colour", "shape"):
                asked, given = (0, 1) if turn.task == "colour" else (1, 0)
                named = [thing for thing in things if thing.split()[given] in turn.question]
                assert [thing.split()[asked] for thing in named] == [turn.answer]


def test_lists_name_everything_in_reading_order():
    """A scene's and a chart's by their content, a screen's by the boxes that other answers give, a part's by its rows."""
    for example in examples("shapes", "train"):
        cells, _, things = example.content.removeprefix("shapes ").partition(": ")
        (listed,) = [turn.answer.split(", ") for turn in example.turns if turn.task == "scene"]
        places = [tasks_shapes.PLACES[int(cells)].index(" ".join(thing.split()[2:])) for thing in listed]
        assert sorted(listed) == sorted(things.split("; ")) and places == sorted(places)
        assert example.turns[-1].task == "scene"
    for example in examples("chart", "train"):
        assert sorted(example.turns[-1].answer.split(", ")) == example.content.removeprefix("chart ").split("; ")
    for example in examples("screen", "train")[:300]:
        listed = example.turns[-1].answer.split(", ")
        boxes = {turn.answer: box_of(turn.question) for turn in example.turns if turn.task == "referring"}
        order = sorted(boxes, key=lambda label: (round(boxes[label][1], -2), boxes[label][0]))
        assert [label for label in listed if label in boxes] == order and len(listed) == tasks_screen.WIDGETS
    for example in examples("widget", "train"):
        rows = [widget.split() for widget in example.content.removeprefix("screen ").split("; ")]
        assert example.turns[-1].answer == ", ".join(label for _, label, _ in sorted(rows, key=lambda row: row[-1]))


def test_widgets_are_painted_inside_their_boxes_and_apart():
    rng = np.random.default_rng(SEED)
    for _ in range(150):
        screen, theme = tasks_screen.draw_screen(rng), tasks_screen.draw_theme(rng)
        boxes = tasks_screen.lay_out(rng, screen)
        for widget, box in zip(screen, boxes, strict=True):
            image = Image.new("RGB", (tasks_screen.WIDTH, tasks_screen.HEIGHT), theme.paper)
            blank = np.array(image)
            tasks_screen.PAINT[widget.kind](rng, image, widget, box, theme)
            rows, columns = np.nonzero((np.array(image) != blank).any(2))
            assert box[0] <= columns.min() and columns.max() < box[2], widget
            assert box[1] <= rows.min() and rows.max() < box[3], widget
        for index, (x1, y1, x2, y2) in enumerate(boxes):
            assert all(x2 <= a1 or a2 <= x1 or y2 <= b1 or b2 <= y1 for a1, b1, a2, b2 in boxes[index + 1 :])


def test_screen_answers_agree_with_each_other():
    for example in (*examples("screen", "train")[:300], *examples("widget", "train")[:300]):
        labels = dict.fromkeys(widget.split()[1] for widget in example.content.removeprefix("screen ").split("; "))
        for turn in example.turns[:-1]:
            if turn.task == "referring":
                label, box = turn.answer, box_of(turn.question)
            else:
                names = (
                    [name for name in labels if name in turn.question]
                    if turn.task == "grounding"
                    else [name for name in labels if any(purpose in turn.question for purpose in tasks_screen.PURPOSES[name])]
                )
                (label,), box = names, box_of(turn.answer)
            assert labels[label] in (None, box)
            labels[label] = box


def test_lines_show_their_text_and_get_closer_by_level():
    """The ink is that of the text, whole; a level is told from the next by how far its characters stand apart."""
    pitches = {}
    for level in range(1, 6):
        found = []
        for index in range(150):
            (turn,), (picture,) = (example := render("lines", SEED, index, "train", level)).turns, example.images
            assert turn.task == "line" and turn.answer == example.content.removeprefix("lines ")
            edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]).mean(axis=1)
            ink = np.abs(picture.mean(axis=2) - np.median(edge)) > 60
            columns = np.flatnonzero(ink.any(0))
            if len(turn.answer) > 4:
                found.append((columns[-1] - columns[0]) / len(turn.answer))
        pitches[level] = np.median(found)
    assert list(pitches.values()) == sorted(pitches.values(), reverse=True) and pitches[1] > 22 > 17 > pitches[5]
    several = [render("lines", SEED, index, "train") for index in range(200)]
    assert {len(example.turns[0].answer.split("\n")) for example in several} == {1, 2, 3, 4}


def test_cached_glyphs_print_what_the_font_prints():
    """But for kerning and rounded steps of the pen: the same height, nearly the same width and as much ink."""
    for text in ("Read me", "jumping", "WAVE 10%", "l"):
        for font in tasks_print.PRINT_FONTS:
            quick, whole = (np.asarray(mask(text, font, 26), float) for mask in (print_mask, text_mask))
            assert abs(quick.shape[0] - whole.shape[0]) <= 1 and abs(quick.shape[1] - whole.shape[1]) <= 1 + 2 * len(text)
            assert quick.sum() == pytest.approx(whole.sum(), rel=0.03)


def test_page_boxes_hold_their_text_whole():
    """Every widget asked about is inside the picture, apart from the others, and shows something in its box."""
    for example in examples("page", "train")[:300]:
        (picture,) = example.images
        found = {}
        for turn in example.turns:
            box = box_of(turn.question if turn.task == "page_referring" else turn.answer)
            found.setdefault(box, set()).add(turn.answer if turn.task == "page_referring" else "")
            x1, y1, x2, y2 = (edge * size / 1000 for edge, size in zip(box, picture.shape[1::-1] * 2, strict=True))
            inside = picture[int(y1) + 3 : int(y2) - 1, int(x1) + 3 : int(x2) - 1]
            assert np.ptp(inside, axis=(0, 1)).max() > 60, turn  # of 255 in some colour
            assert 0 <= x1 < x2 <= picture.shape[1] and 0 <= y1 < y2 <= picture.shape[0]
        assert all(len(texts - {""}) <= 1 for texts in found.values())
        boxes = list(found)
        for i, (x1, y1, x2, y2) in enumerate(boxes):
            assert all(x2 <= a1 + 1 or a2 <= x1 + 1 or y2 <= b1 + 1 or b2 <= y1 + 1 for a1, b1, a2, b2 in boxes[i + 1 :])


@pytest.mark.parametrize("family, task", [("shapes", "scene"), ("chart", "bars"), ("screen", "labels"), ("widget", "labels")])
def test_of_one_picture_in_four_the_list_is_asked_for_alone_and_else_last(family, task):
    alone = [example.turns[0].task == task for example in examples(family, "train")]
    assert np.mean(alone) == pytest.approx(LISTED_ALONE, abs=0.05)  # four standard errors
    assert all(len(e.turns) == 1 if first else e.turns[-1].task == task for e, first in zip(examples(family, "train"), alone))


def test_purposes_name_one_label_each():
    purposes = [purpose for phrases in tasks_screen.PURPOSES.values() for purpose in phrases]
    assert len(set(purposes)) == len(purposes)
    assert not any(one != other and one in other for one in purposes for other in purposes)


def test_chart_answers_agree_with_the_content():
    for example in examples("chart", "validation"):
        bars = dict(bar.split() for bar in example.content.removeprefix("chart ").split("; "))
        assert len(bars) == tasks_chart.BARS
        for turn in example.turns:
            if turn.answer in bars:
                highest = any(word in turn.question for word in ("tallest", "largest", "highest"))
                values = sorted((int(value), colour) for colour, value in bars.items())
                assert turn.answer == values[-1 if highest else 0][1]
            elif turn.task == "chart":
                (colour,) = [colour for colour in bars if colour in turn.question]
                assert turn.answer == bars[colour]


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="task family.*'nothing'.*shapes"):
        render("nothing", 0, 0, "train")
    with pytest.raises(UserError, match="split.*'test'"):
        render("word", 0, 0, "test")
