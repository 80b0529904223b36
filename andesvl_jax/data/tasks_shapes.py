"""Scenes of coloured shapes on a grid: how many there are, what colour one has, where it is, and its box.

The content of a scene is the grid with the sorted list of (colour, shape, place); sizes, places inside a cell and the
background are free. A cell is one visual token.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from PIL import Image

from andesvl_jax.data.drawing import (
    COLOURS,
    SHAPES,
    TOKEN_SIDE,
    Box,
    background,
    box_text,
    jittered,
    neutral,
    pixels,
    shape_mask,
    side,
    stamp,
)
from andesvl_jax.data.examples import MANY, Example, Turn, draw_in_split, pick, with_list

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
        "In which place is the {colour} {shape}?",
        "Which part of the picture shows the {colour} {shape}?",
        "Name the position of the {colour} {shape}.",
        "The {colour} {shape} is in which place?",
    ),
    "box": (
        "Give the box of the {colour} {shape}.",
        "Locate <|object_ref_start|>the {colour} {shape}<|object_ref_end|>.",
        "Draw a box around the {colour} {shape}.",
        "What are the coordinates of the {colour} {shape}?",
        "Find the {colour} {shape} and give its box.",
    ),
    "shape": (
        "Which shape is {colour}?",
        "What shape is the {colour} thing?",
        "Name the shape that is {colour}.",
        "What is the {colour} thing?",
        "Which shape has the colour {colour}?",
    ),
    "thing": (
        "What is at the {place}?",
        "Which thing is at the {place}?",
        "What do you see at the {place}?",
        "Name the thing at the {place}.",
        "At the {place} there is what?",
    ),
    "scene": (
        "List the shapes from top left to bottom right.",
        "What is in the picture, row by row?",
        "Describe the picture.",
        "Name every shape with its colour and place.",
        "Say what you see, from the top down.",
    ),
}
PLACES = {
    2: ("top left", "top right", "bottom left", "bottom right"),
    3: ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"),
}  # by cells a side, row by row
LARGEST_COUNT = MANY
FEW = 3  # things of a small scene
QUESTIONS = 6  # about a small scene
SMALLEST, LARGEST = 15, 24  # pixels
ANGLES = (-14, -7, 0, 7, 14)  # degrees


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; `cell` counts row by row."""

    colour: str
    shape: str
    cell: int


@dataclass(frozen=True)
class Scene:
    """Things in different cells of a square grid of `cells` a side."""

    cells: int
    things: tuple[Thing, ...]

    def place(self, thing: Thing) -> str:
        return PLACES[self.cells][thing.cell]


def draw_scene(rng: np.random.Generator, crowd: int = LARGEST_COUNT) -> Scene:
    """1 to `crowd` things; few of them may stand on the smaller grid."""
    count = int(rng.integers(1, crowd + 1))
    cells = 2 if count <= 3 and rng.random() < 0.3 else 3
    places = rng.permutation(cells * cells)[:count].tolist()
    colours = rng.integers(len(COLOURS), size=count).tolist()
    shapes = rng.integers(len(SHAPES), size=count).tolist()
    names = tuple(COLOURS)
    return Scene(cells, tuple(Thing(names[c], SHAPES[s], cell) for c, s, cell in zip(colours, shapes, places, strict=True)))


def describe(scene: Scene) -> str:
    """Canonical content of a scene."""
    things = sorted(f"{thing.colour} {thing.shape} {scene.place(thing)}" for thing in scene.things)
    return f"shapes {scene.cells}: " + "; ".join(things)


def paint(rng: np.random.Generator, cells: int, thing: Thing, image: Image.Image) -> Box:
    """Paint a thing somewhere inside its cell; returns its box."""
    mask = shape_mask(thing.shape, int(rng.integers(SMALLEST, LARGEST + 1)), pick(rng, ANGLES))
    if max(mask.size) > TOKEN_SIDE - 2:
        mask = shape_mask(thing.shape, LARGEST)
    row, column = divmod(thing.cell, cells)
    x = TOKEN_SIDE * column + int(rng.integers(0, TOKEN_SIDE - mask.width))
    y = TOKEN_SIDE * row + int(rng.integers(0, TOKEN_SIDE - mask.height))
    return stamp(image, mask, jittered(rng, COLOURS[thing.colour]), x, y)


def ask(rng: np.random.Generator, task: str, answer: str, thing: Thing | None = None, place: str = "") -> Turn:
    """A turn in one of the task's wordings."""
    names = {"place": place} if thing is None else {"colour": thing.colour, "shape": thing.shape}
    return Turn(task, pick(rng, WORDINGS[task]).format(**names), answer)


def turns_about(rng: np.random.Generator, scene: Scene, boxes: list[str]) -> list[Turn]:
    """Up to five questions, each about a thing that its wording identifies, and the whole scene; or that alone."""
    things = scene.things
    turns = [ask(rng, "count", str(len(things)))]
    for task, what in (("colour", "shape"), ("shape", "colour")):
        if named := alone(things, what):
            thing = pick(rng, named)
            turns.append(ask(rng, task, getattr(thing, task), thing))
    if named := alone(things, "colour", "shape"):
        thing = pick(rng, named)
        turns.append(ask(rng, "position", scene.place(thing), thing))
        thing = pick(rng, named)
        turns.append(ask(rng, "box", boxes[things.index(thing)], thing))
    order = rng.permutation(len(turns)).tolist()
    listed = ", ".join(f"{t.colour} {t.shape} {scene.place(t)}" for t in sorted(things, key=lambda thing: thing.cell))
    return with_list(rng, [turns[index] for index in order], ask(rng, "scene", listed))


def render_pair(rng: np.random.Generator, split: str, crowd: int = LARGEST_COUNT) -> Example:
    """A scene of one to three things, asked for colour, shape and place of a thing by one another: what binds the three."""
    scene, content = draw_in_split(lambda rng: draw_scene(rng, min(crowd, FEW)), describe, rng, split)
    length = side(scene.cells)
    image = background(rng, length, length, neutral(rng))
    for thing in scene.things:
        paint(rng, scene.cells, thing, image)
    turns = [ask(rng, "shape", thing.shape, thing) for thing in alone(scene.things, "colour")]
    turns += [ask(rng, "colour", thing.colour, thing) for thing in alone(scene.things, "shape")]
    turns += [ask(rng, "position", scene.place(thing), thing) for thing in alone(scene.things, "colour", "shape")]
    turns += [ask(rng, "thing", f"{thing.colour} {thing.shape}", place=scene.place(thing)) for thing in scene.things]
    return Example((pixels(image),), tuple(turns[i] for i in rng.permutation(len(turns))[:QUESTIONS].tolist()), content)


def alone(things: Sequence[Thing], *what: str) -> list[Thing]:
    """Those that share their colour, their shape, or both ("colour", "shape") with no other."""
    key = attrgetter(*what)
    counts = Counter(map(key, things))
    return [thing for thing in things if counts[key(thing)] == 1]


def render_shapes(rng: np.random.Generator, split: str, crowd: int = LARGEST_COUNT) -> Example:
    """One scene and its questions."""
    scene, content = draw_in_split(lambda rng: draw_scene(rng, crowd), describe, rng, split)
    length = side(scene.cells)
    image = background(rng, length, length, neutral(rng))
    boxes = [box_text(paint(rng, scene.cells, thing, image), length, length) for thing in scene.things]
    return Example((pixels(image),), tuple(turns_about(rng, scene, boxes)), content)
