"""Screens of rendered pages: widgets with boxes from the DOM, views of them that small models can read, questions about them.

What counts as a widget is said in `screen.js`. Boxes are pixels of the screen, then of a view of it, then 0..1000 of the view.
Letters are measured in CSS pixels, so that a denser screen shows the same larger.
"""

import io
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from andesvl_jax.data.drawing import Box, box_text
from andesvl_jax.data.examples import Turn, pick
from andesvl_jax.data.tasks_screen import WORDINGS as SCREEN_WORDINGS
from andesvl_jax.errors import UserError

SMALLEST_TEXT = 9  # CSS pixels per em in a view
SMALLEST_SCALE = 0.6  # of a crop: pages set most texts in 14 to 16 CSS pixels
LONGEST_TEXT = 40  # characters
SYMBOLS = "\u2190"  # arrows, signs and emoji begin here, which no tokenizer of words should have to say
INK = 48  # grey levels between the darkest and the lightest part of a widget that can be read
VIEWS = 80  # crops of one screen
TRIES = 240
MOST_SHARED = 0.75  # of the smaller of two crops
MOST_WIDGETS = 1000  # of a screen; more are left out
QUESTIONS = 4
# Parts of a view: crops with two widgets or a few more, on which looking a text up is learned before it is done on whole views.
PARTS = 6  # of one view, at most
PART_NEIGHBOURS = 4  # of its first widget, at most
PART_MARGIN = 28  # pixels around its widgets, at most
LARGEST_PART = 0.9  # of the view's area
LOOK_UPS = 6  # boxes asked for of one picture, at most

PURPOSES = {
    "link": ("open {text}", "go to {text}", "get to {text}"),
    "field": ("type into {text}", "fill in {text}"),
    "checkbox": ("tick {text}", "change the setting {text}"),
    "select": ("choose something other than {text}",),
}
WORDINGS = {
    "referring": SCREEN_WORDINGS["referring"],
    "grounding": SCREEN_WORDINGS["grounding"],
    "screen_qa": SCREEN_WORDINGS["screen_qa"],
    "presence": (
        "Is there a {kind} called {text}?",
        "Does the screen show a {kind} named {text}?",
        "Can I see a {kind} that says {text}?",
        "Do you see the {kind} {text}?",
        "Is a {kind} with the label {text} on the screen?",
    ),
    "neighbour": (
        "What comes right below {text}?",
        "Which entry follows {text}?",
        "What is the next item under {text}?",
        "Name the entry below {text}.",
        "Which label stands directly under {text}?",
    ),
}


@dataclass(frozen=True)
class Widget:
    """Something to tap: its box in pixels, its text, whether that can be seen, and CSS pixels per em of its smallest letters."""

    kind: str
    text: str
    seen: bool
    box: tuple[float, float, float, float]
    size: float


@dataclass(frozen=True)
class Screen:
    """What a window shows. `texts` counts, in lower case, every text in it, of widgets and of others."""

    picture: Image.Image
    widgets: tuple[Widget, ...]
    texts: Counter[str]


def read_screen(found: dict[str, Any], picture: Image.Image, density: int) -> Screen:
    """The value of `screen.js`, in CSS pixels, and the screenshot, `density` as many each way; boxes that leave it are dropped.

    Raises:
      UserError: the value is of another form, as a page can make it that changes what scripts are built on.
    """
    try:
        reported = [_widget(entry, density) for entry in found["widgets"][:MOST_WIDGETS]]
        texts = Counter(str(text).lower() for text in found["texts"])
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"screen: reports widgets that cannot be read ({error}), expected boxes, texts and sizes.") from error
    widgets = []
    for widget, whole in reported:
        box = widget.box
        texts[widget.text.lower()] += 1
        if whole and 0 <= box[0] < box[2] <= picture.width and 0 <= box[1] < box[3] <= picture.height:
            widgets.append(widget)
    return Screen(picture, tuple(widgets), texts)


def _widget(entry: dict[str, Any], density: int) -> tuple[Widget, bool]:
    """A reported widget, and whether it is wholly to be seen."""
    x1, y1, x2, y2 = (density * float(edge) for edge in entry["box"])
    widget = Widget(str(entry["kind"]), str(entry["text"]), bool(entry["seen"]), (x1, y1, x2, y2), float(entry["size"]))
    return widget, entry["whole"] is True


def nameable(screen: Screen) -> Screen:
    """The same screen with only those widgets whose text is on it once and can be read."""
    grey = np.asarray(screen.picture.convert("L"))
    kept = tuple(w for w in screen.widgets if screen.texts[w.text.lower()] == 1 and _is_name(w.text) and _is_inked(grey, w))
    return replace(screen, widgets=kept)


def _is_name(text: str) -> bool:
    plain = text.isprintable() and all(c < SYMBOLS for c in text) and "<|" not in text
    return 1 < len(text) <= LONGEST_TEXT and plain and any(map(str.isalnum, text))


def _is_inked(grey: np.ndarray, widget: Widget) -> bool:
    """Whether something stands out inside the box, the frame left aside."""
    x1, y1, x2, y2 = (int(edge) for edge in widget.box)
    inner = grey[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2]
    return inner.size > 0 and float(np.percentile(inner, 99)) - float(np.percentile(inner, 1)) >= INK


def views(rng: np.random.Generator, screen: Screen, side: int) -> Iterator[Screen]:
    """The whole screen, where its texts stay legible in `side` pixels, and crops, as they are or shrunk. Each has two widgets."""
    scale = min(1.0, side / max(screen.picture.size))
    everything = (0, 0, *screen.picture.size)
    if len(widgets := _legible(screen, everything, scale)) >= 2:
        yield _view(screen, everything, scale, widgets)
    taken: list[Box] = []
    for _ in range(TRIES if screen.widgets and scale < 1 else 0):
        zoom = 1.0 if rng.random() < 0.5 else rng.uniform(SMALLEST_SCALE, 1)
        area = _area(rng, screen, int(side / zoom))
        widgets = _legible(screen, area, zoom)
        if len(widgets) >= 2 and len(taken) < VIEWS and all(_overlap(area, other) < MOST_SHARED for other in taken):
            taken.append(area)
            yield _view(screen, area, zoom, widgets)


def parts(rng: np.random.Generator, view: Screen) -> Iterator[Screen]:
    """Crops of a view around a widget and up to PART_NEIGHBOURS others near it, no two crops with the same widgets."""
    seen: set[frozenset[str]] = set()
    for _ in range(PARTS):
        first = pick(rng, view.widgets)
        others = sorted((w for w in view.widgets if w != first), key=lambda w: _apart(first.box, w.box))
        edges = np.array([w.box for w in (first, *others[: int(rng.integers(1, PART_NEIGHBOURS + 1))])])
        margins = rng.integers(0, PART_MARGIN + 1, 4)
        left, top = np.maximum(edges[:, :2].min(0) - margins[:2], 0).astype(int).tolist()
        right, bottom = np.minimum(np.ceil(edges[:, 2:].max(0)) + margins[2:], view.picture.size).astype(int).tolist()
        area = (left, top, right, bottom)
        widgets = _legible(view, area, 1.0)
        texts = frozenset(widget.text for widget in widgets)
        small = (right - left) * (bottom - top) <= LARGEST_PART * view.picture.width * view.picture.height
        if small and len(widgets) >= 2 and texts not in seen:
            seen.add(texts)
            yield _view(view, area, 1.0, widgets)


def _apart(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Pixels between two boxes, along the axis on which they are farther apart."""
    return max(max(one[axis], other[axis]) - min(one[axis + 2], other[axis + 2]) for axis in range(2))


def _legible(screen: Screen, area: Box, scale: float) -> tuple[Widget, ...]:
    """The widgets that are whole in a part of the screen and can be read at its scale, as they stand there."""
    left, top, right, bottom = area
    return tuple(
        replace(
            widget,
            box=tuple((edge - corner) * scale for edge, corner in zip(widget.box, (left, top) * 2, strict=True)),
            size=widget.size * scale,
        )
        for widget in screen.widgets
        if left <= widget.box[0] and top <= widget.box[1] and widget.box[2] <= right and widget.box[3] <= bottom
        and widget.size * scale >= SMALLEST_TEXT
    )  # fmt: skip


def _view(screen: Screen, area: Box, scale: float, widgets: tuple[Widget, ...]) -> Screen:
    picture = screen.picture.crop(area)
    if scale != 1:
        size = tuple(max(1, round(edge * scale)) for edge in picture.size)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return replace(screen, picture=picture, widgets=widgets)


def _area(rng: np.random.Generator, screen: Screen, side: int) -> Box:
    """A part of the screen around one of its widgets."""
    width, height = (min(int(rng.integers(side * 2 // 3, side + 1)), edge) for edge in screen.picture.size)
    x1, y1, x2, y2 = pick(rng, screen.widgets).box
    left = int(np.clip(x1 - rng.random() * max(0, width - (x2 - x1)), 0, screen.picture.width - width))
    top = int(np.clip(y1 - rng.random() * max(0, height - (y2 - y1)), 0, screen.picture.height - height))
    return left, top, left + width, top + height


def _overlap(one: Box, other: Box) -> float:
    """Shared area as a share of the smaller one."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])  # noqa: E731
    return max(0, width) * max(0, height) / min(area(one), area(other))


def turns_about(rng: np.random.Generator, view: Screen, others: Sequence[Widget]) -> tuple[Turn, ...]:
    """Up to QUESTIONS questions about a view.

    Args:
      others: widgets of other screens, of which one that this screen does not have may be asked about.
    """
    box = lambda widget: box_text(widget.box, view.picture.width, view.picture.height)  # noqa: E731
    order = [view.widgets[i] for i in rng.permutation(len(view.widgets)).tolist()]
    turns = [_turn(rng, "referring", widget.text, box=box(widget)) for widget in order[:2]]
    turns += [_turn(rng, "grounding", box(widget), label=widget.text) for widget in order[-2:]]
    for widget in order:
        if widget.kind in PURPOSES and widget.seen:
            purpose = pick(rng, PURPOSES[widget.kind]).format(text=widget.text)
            turns.append(_turn(rng, "screen_qa", box(widget), purpose=purpose))
            break
    turns += [_turn(rng, "neighbour", below.text, text=above.text) for above, below in neighbours(view)[:1]]
    missing = [widget for widget in others if widget.text.lower() not in view.texts]
    answer, named = ("No", pick(rng, missing)) if missing and rng.random() < 0.5 else ("Yes", order[0])
    turns.append(_turn(rng, "presence", answer, kind=named.kind, text=named.text))
    return tuple(turns[i] for i in rng.permutation(len(turns))[:QUESTIONS].tolist())


def look_ups(rng: np.random.Generator, part: Screen) -> tuple[Turn, ...]:
    """Where its widgets are, up to LOOK_UPS of them, and what stands in the box of one, in random order."""
    asked = [part.widgets[i] for i in rng.permutation(len(part.widgets))[:LOOK_UPS].tolist()]
    boxes = [box_text(widget.box, part.picture.width, part.picture.height) for widget in asked]
    turns = [_turn(rng, "grounding", box, label=widget.text) for widget, box in zip(asked, boxes, strict=True)]
    named = int(rng.integers(len(asked)))
    turns.append(_turn(rng, "referring", asked[named].text, box=boxes[named]))
    return tuple(turns[i] for i in rng.permutation(len(turns)).tolist())


def neighbours(view: Screen) -> list[tuple[Widget, Widget]]:
    """Pairs of widgets that start at one left edge, the second right below the first with nothing between them."""
    pairs = []
    for above, below in itertools.permutations(view.widgets, 2):
        gap, height = below.box[1] - above.box[3], above.box[3] - above.box[1]
        if abs(above.box[0] - below.box[0]) <= 2 and -1 <= gap <= height / 2 and above.seen and below.seen:
            between = (w for w in view.widgets if w not in (above, below) and _is_between(w, above, below))
            if not any(between):
                pairs.append((above, below))
    return pairs


def _is_between(widget: Widget, above: Widget, below: Widget) -> bool:
    middle = (widget.box[1] + widget.box[3]) / 2
    return above.box[1] <= middle <= below.box[3] and widget.box[0] < above.box[2] and above.box[0] < widget.box[2]


def _turn(rng: np.random.Generator, task: str, answer: str, **parts: str) -> Turn:
    return Turn(task, pick(rng, WORDINGS[task]).format(**parts), answer)


def open_picture(data: bytes) -> Image.Image:
    """A screenshot as RGB."""
    return Image.open(io.BytesIO(data), formats=("PNG",)).convert("RGB")
