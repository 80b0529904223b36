"""Bar charts: the value of a bar, and which bar is the tallest or the shortest.

The content is the sorted list of (colour, value); the order of the bars, the numbers above them and the looks are free.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from andesvl_jax.data.drawing import COLOURS, TOKEN_SIDE, background, jittered, neutral, picture_size, pixels, stamp, text_mask
from andesvl_jax.data.examples import Example, Turn, draw_in_split, pick, with_list

VALUE_WORDINGS = (
    "What is the value of the {colour} bar?",
    "How high is the {colour} bar?",
    "Read the value of the {colour} bar.",
    "Which value does the {colour} bar have?",
    "What number does the {colour} bar show?",
)
TALLEST_WORDINGS = (
    "Which bar is the tallest?",
    "What colour is the tallest bar?",
    "Which bar has the largest value?",
    "Name the highest bar.",
    "Which colour has the highest value?",
)
SHORTEST_WORDINGS = (
    "Which bar is the shortest?",
    "What colour is the shortest bar?",
    "Which bar has the smallest value?",
    "Name the lowest bar.",
    "Which colour has the lowest value?",
)
BARS_WORDINGS = (
    "List the bars from left to right.",
    "Read the whole chart.",
    "Give every bar with its value.",
    "What are the colours and values, from the left?",
    "Turn the chart into a list.",
)
WORDINGS = {"chart": VALUE_WORDINGS + TALLEST_WORDINGS + SHORTEST_WORDINGS, "bars": BARS_WORDINGS}
BARS = 4
VALUES = tuple(range(10, 100, 10))
TOP_OF_AXIS = 100
SIZES = ((4, 3), (4, 4))  # visual tokens across and down: one column a bar
TICKS = (0, 50, 100)  # lines of the grid
FONT = "DejaVuSans"


@dataclass(frozen=True)
class Bar:
    """A bar and its place, 0 to 3 from left to right."""

    place: int
    colour: str
    value: int


def draw_chart(rng: np.random.Generator, most: int = BARS) -> tuple[Bar, ...]:
    """Four bars of different colours; any smaller number of them in some of the places where `most` is below four."""
    count = BARS if most >= BARS else int(rng.integers(1, most + 1))
    names = tuple(COLOURS)
    places = rng.permutation(BARS)[:count].tolist()
    colours = rng.permutation(len(names))[:count].tolist()
    values = rng.integers(len(VALUES), size=count).tolist()
    return tuple(Bar(p, names[colour], VALUES[value]) for p, colour, value in zip(places, colours, values, strict=True))


def describe(bars: tuple[Bar, ...]) -> str:
    """Canonical content of a chart."""
    return "chart " + "; ".join(sorted(f"{bar.colour} {bar.value}" for bar in bars))


def paint(rng: np.random.Generator, image: Image.Image, bars: tuple[Bar, ...]) -> None:
    """Grid lines at 0, 50 and 100, and the bars, with or without their values written above."""
    draw = ImageDraw.Draw(image)
    light = sum(image.getpixel((0, 0))) > 3 * 128
    ink = (30, 30, 30) if light else (235, 235, 235)
    grid = (165, 165, 165) if light else (95, 95, 95)
    top, base = int(rng.integers(11, 14)), image.height - int(rng.integers(3, 6))
    for tick in TICKS:
        y = base - (base - top) * tick // TOP_OF_AXIS
        draw.line((0, y, image.width, y), fill=ink if tick == 0 else grid)
    bar_width = int(rng.integers(13, 24))
    written = rng.random() < 0.5
    for bar in bars:
        x = TOKEN_SIDE * bar.place + (TOKEN_SIDE - bar_width) // 2 + int(rng.integers(-2, 3))
        y = base - round((base - top) * bar.value / TOP_OF_AXIS)
        draw.rectangle((x, y, x + bar_width - 1, base - 1), fill=jittered(rng, COLOURS[bar.colour]))
        if written:
            mask = text_mask(str(bar.value), FONT, 9)
            stamp(image, mask, ink, x + (bar_width - mask.width) // 2, y - 1 - mask.height)


def turns_about(rng: np.random.Generator, bars: tuple[Bar, ...]) -> list[Turn]:
    """The values of two bars, the tallest or shortest bar where there is only one, and the whole chart; or that alone."""
    turns = []
    for index in rng.permutation(len(bars))[:2].tolist():
        turns.append(Turn("chart", pick(rng, VALUE_WORDINGS).format(colour=bars[index].colour), str(bars[index].value)))
    values = [bar.value for bar in bars]
    extreme, wordings = (max, TALLEST_WORDINGS) if rng.random() < 0.65 else (min, SHORTEST_WORDINGS)
    if values.count(extreme(values)) == 1:
        turns.append(Turn("chart", pick(rng, wordings), bars[values.index(extreme(values))].colour))
    order = rng.permutation(len(turns)).tolist()
    listed = ", ".join(f"{bar.colour} {bar.value}" for bar in sorted(bars, key=lambda bar: bar.place))
    return with_list(rng, [turns[index] for index in order], Turn("bars", pick(rng, BARS_WORDINGS), listed))


def render_chart(rng: np.random.Generator, split: str, crowd: int) -> Example:
    """One bar chart and its questions."""
    bars, content = draw_in_split(lambda rng: draw_chart(rng, crowd), describe, rng, split)
    width, height = picture_size(rng, SIZES)
    image = background(rng, width, height, neutral(rng))
    paint(rng, image, bars)
    return Example((pixels(image),), tuple(turns_about(rng, bars)), content)
