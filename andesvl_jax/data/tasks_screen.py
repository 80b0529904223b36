"""Small phone screens: name the widget in a box, give the box of a named widget, or of the one to tap for a purpose.

The content is the sorted list of (kind, label, row); the theme, the sizes and the switches' states are free.
Answers follow AndesVL's GUI data: boxes in 0..1000, question answering whose answer is the box to tap.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from andesvl_jax.data.drawing import (
    COLOURS,
    SHAPES,
    TOKEN_SIDE,
    Box,
    box_text,
    jittered,
    pixels,
    shape_mask,
    side,
    stamp,
    text_mask,
)
from andesvl_jax.data.examples import Example, Turn, draw_in_split, pick, with_list

WORDINGS = {
    "referring": (
        "What is at {box}?",
        "Name the widget at {box}.",
        "Which label is in {box}?",
        "What does the widget in {box} say?",
        "Read the label of the widget at {box}.",
        "请给出坐标为{box}的控件名称。",
    ),
    "grounding": (
        "Locate <|object_ref_start|>{label}<|object_ref_end|>.",
        "Where is {label} on the screen?",
        "Give the box of {label}.",
        "Find the widget called {label}.",
        "What are the coordinates of {label}?",
    ),
    "screen_qa": (
        "Where do I tap to {purpose}?",
        "I want to {purpose}.",
        "Which widget do I use to {purpose}?",
        "How can I {purpose}?",
        "Show me where to tap to {purpose}.",
    ),
    "labels": (
        "List the labels from top to bottom.",
        "Read the whole screen.",
        "Which widgets are on the screen?",
        "Name every widget, row by row.",
        "What can be read on this screen?",
    ),
}
PURPOSES = {
    "Save": ("keep my changes", "store this file"),
    "Send": ("post the message", "get this message out"),
    "Wi-Fi": ("connect to the wireless network", "get online"),
    "Mail": ("write a letter", "read my letters"),
    "Call": ("phone a friend", "talk to my mother"),
    "Maps": ("see the way to the station", "plan a route"),
    "Music": ("listen to a song", "hear a tune"),
    "Photo": ("take a picture", "look at my pictures"),
    "Alarm": ("wake up at seven", "be woken in time"),
    "Search": ("look for a word", "find something"),
    "Lock": ("secure the phone", "keep others out"),
    "Light": ("see in the dark", "make the lamp brighter"),
    "Sound": ("make it louder", "change the volume"),
    "Delete": ("throw this away", "remove this file"),
    "Share": ("show this to others", "pass this on"),
    "Back": ("return to the last page", "leave this page"),
    "Help": ("get advice", "learn how this works"),
    "Pay": ("buy the ticket", "spend money"),
}
LABELS = tuple(PURPOSES)
SETTINGS = frozenset({"Wi-Fi", "Alarm", "Lock", "Light", "Sound", "Photo", "Maps", "Mail", "Music"})
TITLES = ("Settings", "Notes", "Today", "Menu", "Options", "Files")
WIDTH, HEIGHT = side(4), side(5)
FONT, LABEL_SIZE, TITLE_SIZE = "DejaVuSans", 11, 10
GAP = 3  # pixels between widgets
STEP = 14  # pixels that rows are indented by
WIDGETS = 4
FEW = 2  # widgets of a part of a screen
QUESTIONS = 3  # per screen, beside the list of labels: with the picture about 180 tokens


@dataclass(frozen=True)
class Widget:
    """What a widget is, independent of its looks."""

    kind: str
    label: str
    row: int
    column: int = 0  # of a tile


@dataclass(frozen=True)
class Theme:
    """Colours of a screen."""

    paper: tuple[int, int, int]
    card: tuple[int, int, int]
    ink: tuple[int, int, int]
    faint: tuple[int, int, int]
    accent: tuple[int, int, int]


Paint = Callable[[np.random.Generator, Image.Image, Widget, Box, Theme], None]


def draw_screen(rng: np.random.Generator, most: int = WIDGETS) -> tuple[Widget, ...]:
    """Four widgets with different labels, a list of rows or tiles two to a row; fewer of them where `most` is below four."""
    count = WIDGETS if most >= WIDGETS else int(rng.integers(1, most + 1))
    labels = [LABELS[index] for index in rng.permutation(len(LABELS))[:count].tolist()]
    places = rng.permutation(WIDGETS)[:count].tolist()
    if rng.random() < 0.35:
        return tuple(Widget("tile", label, place // 2, place % 2) for label, place in zip(labels, places, strict=True))
    return rows_of(rng, labels, places)


def draw_part(rng: np.random.Generator, most: int = FEW) -> tuple[Widget, ...]:
    """Two rows with different labels, one below the other; one where `most` is below two."""
    labels = [LABELS[index] for index in rng.permutation(len(LABELS))[:most].tolist()]
    return rows_of(rng, labels, range(len(labels)))


def rows_of(rng: np.random.Generator, labels: Sequence[str], rows: Sequence[int]) -> tuple[Widget, ...]:
    """A widget for every label, each in its row."""
    return tuple(Widget(pick(rng, kinds_of(label)), label, row) for label, row in zip(labels, rows, strict=True))


def kinds_of(label: str) -> tuple[str, ...]:
    """The kinds of widget a label may be on: settings can be switched, everything else is pressed or filled in."""
    return ("toggle", "checkbox", "slider") if label in SETTINGS else ("button", "button", "field")


def describe(screen: tuple[Widget, ...]) -> str:
    """Canonical content of a screen."""
    return "screen " + "; ".join(sorted(f"{widget.kind} {widget.label} {widget.row}" for widget in screen))


def draw_theme(rng: np.random.Generator) -> Theme:
    """A light or dark theme around one accent colour."""
    accent = jittered(rng, pick(rng, tuple(COLOURS.values())))
    if rng.random() < 0.75:
        paper = int(rng.integers(222, 246))
        return Theme((paper,) * 3, (255,) * 3, (20, 20, 24), (150, 150, 156), accent)
    paper = int(rng.integers(8, 30))
    return Theme((paper,) * 3, (paper + 28,) * 3, (240, 240, 244), (120, 120, 126), accent)


def readable_on(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white ink, whichever stands out on the colour."""
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return (0, 0, 0) if luma > 140 else (255, 255, 255)


def lay_out(rng: np.random.Generator, screen: tuple[Widget, ...], top: int = TOKEN_SIDE) -> list[Box]:
    """A box per widget below `top` pixels: rows of one visual token, tiles of two by two, of uneven widths and edges."""
    boxes = []
    for widget in screen:
        inset = rng.integers(0, 3, 2).tolist()
        if widget.kind == "tile":
            middle, row = WIDTH // 2, top + 2 * TOKEN_SIDE * widget.row
            x1, x2 = (GAP, middle - 1) if widget.column == 0 else (middle + 2, WIDTH - GAP)
            boxes.append(
                (
                    x1 + int(rng.integers(0, 5)),
                    row + 1 + inset[0],
                    x2 - int(rng.integers(0, 5)),
                    row + 2 * TOKEN_SIDE - 2 - inset[1],
                )
            )
        else:
            row = top + TOKEN_SIDE * widget.row
            x1 = GAP + STEP * int(rng.integers(3 if widget.kind in ("button", "field") else 2))
            width = int(rng.integers(62 if widget.kind in ("button", "field") else 88, WIDTH - GAP - x1))
            boxes.append((x1, row + 1 + inset[0], x1 + width, row + TOKEN_SIDE - 2 - inset[1]))
    return boxes


def write(image: Image.Image, text: str, ink: tuple[int, int, int], x: int, middle: int, size: int = LABEL_SIZE) -> None:
    """Write text from x on, centred on the line `middle`."""
    mask = text_mask(text, FONT, size)
    stamp(image, mask, ink, x, middle - mask.height // 2)


def paint_button(rng: np.random.Generator, image: Image.Image, widget: Widget, box: Box, theme: Theme) -> None:
    """A filled rounded box with its label at the left."""
    x1, y1, x2, y2 = box
    ImageDraw.Draw(image).rounded_rectangle((x1, y1, x2 - 1, y2 - 1), radius=4, fill=theme.accent)
    write(image, widget.label, readable_on(theme.accent), x1 + 4, (y1 + y2) // 2)


def paint_field(rng: np.random.Generator, image: Image.Image, widget: Widget, box: Box, theme: Theme) -> None:
    """An outlined box with its label at the left and a cursor after it."""
    x1, y1, x2, y2 = box
    draw = ImageDraw.Draw(image)
    draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=theme.card, outline=theme.accent)
    write(image, widget.label, theme.ink, x1 + 4, (y1 + y2) // 2)
    cursor = x1 + 7 + text_mask(widget.label, FONT, LABEL_SIZE).width
    draw.line((cursor, y1 + 3, cursor, y2 - 4), fill=theme.accent)


def paint_toggle(rng: np.random.Generator, image: Image.Image, widget: Widget, box: Box, theme: Theme) -> None:
    """A card with its label at the left and a switch, on or off, at the right."""
    x1, y1, x2, y2 = box
    middle, on = (y1 + y2) // 2, rng.random() < 0.5
    draw = ImageDraw.Draw(image)
    draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=theme.card)
    write(image, widget.label, theme.ink, x1 + 4, middle)
    draw.rounded_rectangle((x2 - 24, middle - 5, x2 - 4, middle + 5), radius=5, fill=theme.accent if on else theme.faint)
    stamp(image, shape_mask("circle", 8), (255, 255, 255), x2 - 13 if on else x2 - 23, middle - 4)


def paint_checkbox(rng: np.random.Generator, image: Image.Image, widget: Widget, box: Box, theme: Theme) -> None:
    """A card with a small square, ticked or not, and its label to the right of it."""
    x1, y1, x2, y2 = box
    middle = (y1 + y2) // 2
    draw = ImageDraw.Draw(image)
    draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=theme.card)
    draw.rectangle((x1 + 4, middle - 5, x1 + 14, middle + 5), outline=theme.ink)
    if rng.random() < 0.5:
        draw.line((x1 + 6, middle, x1 + 8, middle + 3, x1 + 13, middle - 4), fill=theme.accent, width=2)
    write(image, widget.label, theme.ink, x1 + 18, middle)


def paint_slider(rng: np.random.Generator, image: Image.Image, widget: Widget, box: Box, theme: Theme) -> None:
    """A card with its label at the left and a track with a knob at the right."""
    x1, y1, x2, y2 = box
    middle = (y1 + y2) // 2
    draw = ImageDraw.Draw(image)
    draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=theme.card)
    write(image, widget.label, theme.ink, x1 + 4, middle)
    start, end = x1 + 46, x2 - 6
    knob = int(rng.integers(start + 4, end - 4))
    draw.line((start, middle, end, middle), fill=theme.faint, width=3)
    draw.line((start, middle, knob, middle), fill=theme.accent, width=3)
    stamp(image, shape_mask("circle", 9), theme.accent, knob - 4, middle - 4)


def paint_tile(rng: np.random.Generator, image: Image.Image, widget: Widget, box: Box, theme: Theme) -> None:
    """A card with an icon, always the same for a label, and the label below it."""
    x1, y1, x2, y2 = box
    ImageDraw.Draw(image).rounded_rectangle((x1, y1, x2 - 1, y2 - 1), radius=4, fill=theme.card)
    number = LABELS.index(widget.label)
    colour = tuple(COLOURS.values())[number % len(COLOURS)]
    icon = shape_mask(SHAPES[number % len(SHAPES)], max(8, min(22, y2 - y1 - 20)))
    stamp(image, icon, colour, (x1 + x2 - icon.width) // 2, (y1 + y2 - 14 - icon.height) // 2)
    mask = text_mask(widget.label, FONT, LABEL_SIZE)
    write(image, widget.label, theme.ink, (x1 + x2 - mask.width) // 2, y2 - 8)


PAINT: dict[str, Paint] = {
    "button": paint_button,
    "field": paint_field,
    "toggle": paint_toggle,
    "checkbox": paint_checkbox,
    "slider": paint_slider,
    "tile": paint_tile,
}


def turns_about(rng: np.random.Generator, screen: tuple[Widget, ...], boxes: list[str]) -> list[Turn]:
    """Three of six questions, two of each task about different widgets, in random order, and the list of labels; or it alone."""
    turns = []
    for task in ("referring", "grounding", "screen_qa"):
        turns += [ask(rng, task, screen[index].label, boxes[index]) for index in rng.permutation(len(screen))[:2].tolist()]
    order = rng.permutation(len(turns)).tolist()
    listed = ", ".join(widget.label for widget in sorted(screen, key=lambda widget: (widget.row, widget.column)))
    return with_list(rng, [turns[index] for index in order[:QUESTIONS]], Turn("labels", pick(rng, WORDINGS["labels"]), listed))


def ask(rng: np.random.Generator, task: str, label: str, box: str) -> Turn:
    """A turn about one widget in one of the task's wordings."""
    question = pick(rng, WORDINGS[task]).format(label=label, box=box, purpose=pick(rng, PURPOSES[label]))
    return Turn(task, question, label if task == "referring" else box)


def render_screen(rng: np.random.Generator, split: str, crowd: int) -> Example:
    """One screen and its questions."""
    screen, content = draw_in_split(lambda rng: draw_screen(rng, crowd), describe, rng, split)
    theme = draw_theme(rng)
    image = Image.new("RGB", (WIDTH, HEIGHT), theme.paper)
    title_height = int(rng.integers(20, TOKEN_SIDE))
    ImageDraw.Draw(image).rectangle((0, 0, WIDTH, title_height - 1), fill=theme.accent)
    write(image, pick(rng, TITLES), readable_on(theme.accent), int(rng.integers(4, 40)), title_height // 2, TITLE_SIZE)
    boxes = paint(rng, image, screen, theme)
    return Example((pixels(image),), tuple(turns_about(rng, screen, boxes)), content)


def render_widget(rng: np.random.Generator, split: str, crowd: int) -> Example:
    """Two rows of a screen, to be read before a model has to find them on a whole one."""
    screen, content = draw_in_split(lambda rng: draw_part(rng, min(crowd, FEW)), describe, rng, split)
    theme = draw_theme(rng)
    image = Image.new("RGB", (WIDTH, side(len(screen))), theme.paper)
    boxes = paint(rng, image, screen, theme, top=0)
    return Example((pixels(image),), tuple(turns_about(rng, screen, boxes)), content)


def paint(
    rng: np.random.Generator, image: Image.Image, screen: tuple[Widget, ...], theme: Theme, top: int = TOKEN_SIDE
) -> list[str]:
    """Paint the widgets below `top` pixels; returns their boxes as text."""
    places = lay_out(rng, screen, top)
    for widget, box in zip(screen, places, strict=True):
        PAINT[widget.kind](rng, image, widget, box, theme)
    return [box_text(box, *image.size) for box in places]
