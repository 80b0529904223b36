"""Scenes of coloured shapes on a grid: how many there are, what colour one has, where it is, its box; or the whole told.

The content of a scene is the grid with the sorted list of (colour, shape, place); sizes, places inside a cell and the
background are free. A cell is one visual token.
"""

from collections import Counter
from dataclasses import dataclass

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
}
TELL = ("Describe the picture.", "What is in the picture?", "Tell me what you see.", "What is where?", "Describe it row by row.")
PLACES = {
    2: ("top left", "top right", "bottom left", "bottom right"),
    3: ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"),
}  # by cells a side, row by row
LARGEST_COUNT = 6
FILLED = 0.85  # share of the cells of a described scene that hold a thing
QUESTIONS = 4  # per scene
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


def draw_scene(rng: np.random.Generator) -> Scene:
    """1 to 6 things; few of them may stand on the smaller grid."""
    count = int(rng.integers(1, LARGEST_COUNT + 1))
    cells = 2 if count <= 3 and rng.random() < 0.3 else 3
    return Scene(cells, draw_things(rng, rng.permutation(cells * cells)[:count].tolist()))


def draw_full_scene(rng: np.random.Generator) -> Scene:
    """A thing in nearly every cell of either grid."""
    cells = int(rng.integers(2, 4))
    return Scene(cells, draw_things(rng, np.flatnonzero(rng.random(cells * cells) < FILLED).tolist()))


def draw_things(rng: np.random.Generator, places: list[int]) -> tuple[Thing, ...]:
    """A thing of any colour and shape in each of the places."""
    colours = rng.integers(len(COLOURS), size=len(places)).tolist()
    shapes = rng.integers(len(SHAPES), size=len(places)).tolist()
    names = tuple(COLOURS)
    return tuple(Thing(names[c], SHAPES[s], cell) for c, s, cell in zip(colours, shapes, places, strict=True))


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


def ask(rng: np.random.Generator, task: str, answer: str, thing: Thing | None = None) -> Turn:
    """A turn in one of the task's wordings."""
    names = {} if thing is None else {"colour": thing.colour, "shape": thing.shape}
    return Turn(task, pick(rng, WORDINGS[task]).format(**names), answer)


def turns_about(rng: np.random.Generator, scene: Scene, boxes: list[str], tasks: tuple[str, ...]) -> list[Turn]:
    """Up to four questions of `tasks`, each about a thing that its wording identifies; one of a task where several are asked."""
    things = scene.things
    shapes = Counter(thing.shape for thing in things)
    kinds = Counter((thing.colour, thing.shape) for thing in things)
    lone = [index for index, thing in enumerate(things) if kinds[thing.colour, thing.shape] == 1]
    answers = {
        "count": [(str(len(things)), None)],
        "colour": [(thing.colour, thing) for thing in things if shapes[thing.shape] == 1],
        "position": [(scene.place(things[index]), things[index]) for index in lone],
        "box": [(boxes[index], things[index]) for index in lone],
    }
    turns = []
    for task in tasks:
        most = QUESTIONS if len(tasks) == 1 else 1
        chosen = rng.permutation(len(answers[task]))[:most].tolist()
        turns += [ask(rng, task, *answers[task][index]) for index in chosen]
    order = rng.permutation(len(turns)).tolist()
    return [turns[index] for index in order]


def picture_of(rng: np.random.Generator, scene: Scene) -> tuple[np.ndarray, list[str]]:
    """uint8 [H, W, 3] of a scene, and the box of each of its things."""
    length = side(scene.cells)
    image = background(rng, length, length, neutral(rng))
    boxes = [box_text(paint(rng, scene.cells, thing, image), length, length) for thing in scene.things]
    return pixels(image), boxes


def render_shapes(rng: np.random.Generator, split: str, tasks: tuple[str, ...] = tuple(WORDINGS)) -> Example:
    """One scene and questions about it, at least one."""
    while True:
        scene, content = draw_in_split(draw_scene, describe, rng, split)
        picture, boxes = picture_of(rng, scene)
        turns = turns_about(rng, scene, boxes, tasks)
        if turns:
            return Example((picture,), tuple(turns), content)


def tell_shapes(rng: np.random.Generator, split: str) -> Example:
    """A full scene told cell by cell, row by row: "red circle, nothing, blue star, ..."."""
    scene, content = draw_in_split(draw_full_scene, describe, rng, split)
    picture, _ = picture_of(rng, scene)
    held = {thing.cell: f"{thing.colour} {thing.shape}" for thing in scene.things}
    answer = ", ".join(held.get(cell, "nothing") for cell in range(scene.cells**2))
    return Example((picture,), (Turn("tell", pick(rng, TELL), answer),), content)
