"""Scenes of coloured shapes: how many there are, what colour one has, which quarter it is in, and its box.

The content of a scene is the sorted list of (colour, shape, quarter); sizes, places inside a quarter, the picture's
proportions and the background are free.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from andesvl_jax.data.drawing import (
    COLOURS,
    SHAPES,
    Box,
    background,
    box_text,
    jittered,
    neutral,
    picture_size,
    pixels,
    shape_mask,
    stamp,
)
from andesvl_jax.data.examples import Example, Turn, draw_in_split, pick

WORDINGS = {
    "count": (
        "How many shapes are there?",
        "Count the shapes.",
        "How many shapes do you see?",
        "What is the number of shapes in the picture?",
        "How many objects are shown?",
        "Give the number of objects.",
    ),
    "colour": (
        "What colour is the {shape}?",
        "What is the colour of the {shape}?",
        "Which colour does the {shape} have?",
        "Name the colour of the {shape}.",
        "The {shape} has which colour?",
    ),
    "position": (
        "Where is the {colour} {shape}?",
        "In which corner is the {colour} {shape}?",
        "Which part of the picture shows the {colour} {shape}?",
        "Name the position of the {colour} {shape}.",
        "The {colour} {shape} is in which corner?",
    ),
    "box": (
        "Give the box of the {colour} {shape}.",
        "Locate <|object_ref_start|>the {colour} {shape}<|object_ref_end|>.",
        "Draw a box around the {colour} {shape}.",
        "What are the coordinates of the {colour} {shape}?",
        "Find the {colour} {shape} and give its box.",
    ),
}
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
LARGEST_COUNT = 6
SQUARE, OBLONG = ((3, 3),), ((4, 3), (3, 4))  # visual tokens across and down
EDGE, MIDDLE = 2, 4  # pixels kept free at the border and on either side of the lines between quarters
SMALLEST, LARGEST = 15, 31  # pixels
ANGLES = (-14, -7, 0, 7, 14)  # degrees


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; `slot` says which half of the quarter it may use, None for all of it."""

    colour: str
    shape: str
    quarter: int
    slot: int | None


def draw_scene(rng: np.random.Generator) -> tuple[Thing, ...]:
    """1 to 6 things, at most two in a quarter."""
    count = int(rng.integers(1, LARGEST_COUNT + 1))
    one_per_quarter = count <= 4 and rng.random() < 0.5
    places = rng.permutation(4 if one_per_quarter else 8)[:count].tolist()
    taken = Counter(place % 4 for place in places)
    colours = rng.integers(len(COLOURS), size=count).tolist()
    shapes = rng.integers(len(SHAPES), size=count).tolist()
    names = tuple(COLOURS)
    return tuple(Thing(names[colour], SHAPES[shape], place % 4, place // 4 if taken[place % 4] > 1 else None)
                 for colour, shape, place in zip(colours, shapes, places, strict=True))


def describe(scene: tuple[Thing, ...]) -> str:
    """Canonical content of a scene."""
    return "shapes " + "; ".join(sorted(f"{thing.colour} {thing.shape} {QUARTERS[thing.quarter]}" for thing in scene))


def cell_of(thing: Thing, width: int, height: int) -> Box:
    """The pixels a thing may cover: its quarter of the picture, or half of that quarter along the longer side."""
    column, row = thing.quarter % 2, thing.quarter // 2
    x1, x2 = (EDGE, width // 2 - MIDDLE) if column == 0 else (width // 2 + MIDDLE, width - EDGE)
    y1, y2 = (EDGE, height // 2 - MIDDLE) if row == 0 else (height // 2 + MIDDLE, height - EDGE)
    if thing.slot is None:
        return x1, y1, x2, y2
    if width > height:
        half = (x2 - x1) // 2
        return x1 + half * thing.slot, y1, x1 + half * (thing.slot + 1) - 1, y2
    half = (y2 - y1) // 2
    return x1, y1 + half * thing.slot, x2, y1 + half * (thing.slot + 1) - 1


def place(rng: np.random.Generator, thing: Thing, image: Image.Image) -> Box:
    """Paint a thing somewhere inside its cell; returns its box."""
    x1, y1, x2, y2 = cell_of(thing, image.width, image.height)
    room = min(x2 - x1, y2 - y1)
    size = int(rng.integers(SMALLEST, min(LARGEST, room) + 1))
    mask = shape_mask(thing.shape, size, pick(rng, ANGLES))
    if max(mask.size) > room:
        mask = shape_mask(thing.shape, size)
    x = int(rng.integers(x1, max(x1, x2 - mask.width) + 1))
    y = int(rng.integers(y1, max(y1, y2 - mask.height) + 1))
    return stamp(image, mask, jittered(rng, COLOURS[thing.colour]), x, y)


def ask(rng: np.random.Generator, task: str, answer: str, thing: Thing | None = None) -> Turn:
    """A turn in one of the task's wordings."""
    names = {} if thing is None else {"colour": thing.colour, "shape": thing.shape}
    return Turn(task, pick(rng, WORDINGS[task]).format(**names), answer)


def turns_about(rng: np.random.Generator, scene: tuple[Thing, ...], boxes: list[str]) -> list[Turn]:
    """Up to four questions, each about a thing that its wording identifies."""
    turns = [ask(rng, "count", str(len(scene)))]
    shapes = Counter(thing.shape for thing in scene)
    kinds = Counter((thing.colour, thing.shape) for thing in scene)
    lone_shapes = [thing for thing in scene if shapes[thing.shape] == 1]
    lone = [index for index, thing in enumerate(scene) if kinds[thing.colour, thing.shape] == 1]
    if lone_shapes:
        thing = pick(rng, lone_shapes)
        turns.append(ask(rng, "colour", thing.colour, thing))
    # Finding one thing among many is hard at this size, so crowded scenes are asked about less often.
    if lone and (len(scene) <= 3 or rng.random() < 0.3):
        thing = scene[pick(rng, lone)]
        turns.append(ask(rng, "position", QUARTERS[thing.quarter], thing))
        index = pick(rng, lone)
        turns.append(ask(rng, "box", boxes[index], scene[index]))
    order = rng.permutation(len(turns)).tolist()
    return [turns[index] for index in order]


def render_shapes(rng: np.random.Generator, split: str) -> Example:
    """One scene and its questions."""
    scene, content = draw_in_split(draw_scene, describe, rng, split)
    crowded = any(thing.slot is not None for thing in scene) or len(scene) > 4
    width, height = picture_size(rng, OBLONG if crowded or rng.random() < 0.4 else SQUARE)
    image = background(rng, width, height, neutral(rng))
    boxes = [box_text(place(rng, thing, image), width, height) for thing in scene]
    return Example((pixels(image),), tuple(turns_about(rng, scene, boxes)), content)
