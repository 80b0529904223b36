"""Parts of web-like pages: buttons, links, menus, fields, tabs and boxes to tick with any words, free of the token grid.

What real screens show and `screen` does not: labels that nobody knows by sight, in small print, among headings and running text.
A part is cut out of a longer page, so that widgets are cut at its edges too; only whole ones are asked about.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from andesvl_jax.data.drawing import Box, box_text, pixels, print_mask, print_width, side, stamp
from andesvl_jax.data.english import words
from andesvl_jax.data.examples import MANY, Example, Turn, draw_in_split, pick
from andesvl_jax.data.tasks_print import SIZES, draw_text
from andesvl_jax.data.tasks_screen import WORDINGS as SCREEN_WORDINGS
from andesvl_jax.data.tasks_screen import Theme, draw_theme, readable_on

WORDINGS = {"page_referring": SCREEN_WORDINGS["referring"], "page_grounding": SCREEN_WORDINGS["grounding"]}
ASKED = 2  # times of each task, at most
PAGE_FONTS = ("Aileron", "Aileron", "DejaVuSans", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "STIXGeneral")
SIDES = (6, 10)  # visual tokens, smallest and largest
LONGEST = 22  # characters of a label
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Entry:
    """A widget as it was painted: its kind, its text, and its box in pixels of the page."""

    kind: str
    text: str
    box: Box


@dataclass
class Page:
    """A page while it is painted from the top down: labels to come, pixels per em of its letters, what stands on it."""

    image: Image.Image
    theme: Theme
    font: str
    size: int
    labels: list[str]
    entries: list[Entry]

    @property
    def pen(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.image)

    @property
    def link_ink(self) -> tuple[int, int, int]:
        """The accent where it stands out on the paper."""
        apart = sum(abs(a - b) * w for a, b, w in zip(self.theme.accent, self.theme.paper, LUMA, strict=True))
        return self.theme.accent if apart > 70 else self.theme.ink

    def width(self, text: str, scale: float = 1.0) -> int:
        return print_width(text, self.font, 2 * int(self.size * scale / 2))

    @property
    def line(self) -> int:
        """Pixels from one line of text to the next."""
        return int(self.size * 1.45)

    def write(self, text: str, ink: tuple[int, int, int], x: int, middle: int, scale: float = 1.0) -> Box:
        mask = print_mask(text, self.font, 2 * int(self.size * scale / 2))
        return stamp(self.image, mask, ink, x, middle - mask.height // 2)


Block = Callable[[np.random.Generator, Page, int, int, int], int]


def paint_heading(rng: np.random.Generator, page: Page, x: int, y: int, right: int) -> int:
    """A title that is no widget. Like every block: painted from (x, y) on to the edge `right`; returns where it ends."""
    text = draw_text(rng, 14)
    page.write(text, page.theme.ink, x, y + page.size, 1.4)
    return y + 2 * page.size


def paint_paragraph(rng: np.random.Generator, page: Page, x: int, y: int, right: int) -> int:
    """Lines of running text."""
    for _ in range(int(rng.integers(1, 4))):
        line = " ".join(pick(rng, words()) for _ in range(5))
        while len(line) > 4 and x + page.width(line, 0.9) > right:
            line = line.rpartition(" ")[0] or line[:4]
        page.write(line, page.theme.faint if rng.random() < 0.5 else page.theme.ink, x, y + page.size // 2, 0.9)
        y += page.line
    return y


def paint_buttons(rng: np.random.Generator, page: Page, x: int, y: int, right: int) -> int:
    """One to three buttons side by side, filled, pale or outlined, their labels in the middle."""
    height = page.line + int(rng.integers(4, 20))
    look, radius = int(rng.integers(3)), int(rng.integers(0, height // 2))
    for _ in range(int(rng.integers(1, 4))):
        if not page.labels:
            break
        margin = int(rng.integers(8, 28))
        box = (x, y, x + page.width(page.labels[-1]) + 2 * margin, y + height)
        if box[2] > right + 40:  # some are cut at the edge
            break
        fill = (page.theme.accent, page.theme.card, None)[look]
        outline = page.theme.accent if look == 2 else None
        page.pen.rounded_rectangle((*box[:2], box[2] - 1, box[3] - 1), radius, fill=fill, outline=outline, width=2)
        ink = readable_on(page.theme.accent) if look == 0 else page.theme.ink
        text = page.labels.pop()
        page.write(text, ink, x + margin, y + height // 2)
        page.entries.append(Entry("button", text, box))
        x = box[2] + int(rng.integers(6, 24))
    return y + height


def paint_links(rng: np.random.Generator, page: Page, x: int, y: int, right: int) -> int:
    """Links side by side, some underlined."""
    height, underlined = page.line, rng.random() < 0.3
    for _ in range(int(rng.integers(1, 4))):
        if not page.labels or x + page.width(page.labels[-1]) > right + 30:
            break
        text = page.labels.pop()
        left, _, end, _ = page.write(text, page.link_ink, x, y + height // 2)
        if underlined:
            page.pen.line((left, y + height - 5, end, y + height - 5), fill=page.theme.accent, width=2)
        page.entries.append(Entry("link", text, (x, y, end, y + height)))
        x = end + int(rng.integers(14, 34))
    return y + height


def paint_menu(rng: np.random.Generator, page: Page, x: int, y: int, right: int) -> int:
    """Entries one below the other, each as wide as the menu, with small pictures before them or not, one of them chosen."""
    height, icons = page.line + int(rng.integers(2, 18)), rng.random() < 0.5
    end = min(right, x + int(rng.integers(150, 280)))
    count, chosen = int(rng.integers(2, 5)), int(rng.integers(6))
    if rng.random() < 0.5:
        page.pen.rectangle((x, y, end - 1, y + count * height - 1), fill=page.theme.card)
    for place in range(count):
        if not page.labels:
            break
        text, middle = page.labels.pop(), y + height // 2
        if place == chosen:
            page.pen.rectangle((x, y, end - 1, y + height - 1), fill=page.theme.accent)
        ink = readable_on(page.theme.accent) if place == chosen else page.theme.ink
        left = x + int(page.size * 0.5)
        if icons:
            half = int(page.size * 0.4)
            shape = pick(rng, (page.pen.ellipse, page.pen.rectangle))
            shape((left, middle - half, left + 2 * half, middle + half), outline=ink, width=2)
            left += int(page.size * 1.3)
        if page.write(text, ink, left, middle)[2] <= end:
            page.entries.append(Entry("link", text, (x, y, end, y + height)))
        y += height
    return y


def paint_field(rng: np.random.Generator, page: Page, x: int, y: int, right: int) -> int:
    """An outlined field with what it is for, or what was typed, in it."""
    if not page.labels:
        return y
    height, end = page.line + int(rng.integers(6, 20)), min(right, x + int(rng.integers(140, 300)))
    box = (x, y, end, y + height)
    page.pen.rounded_rectangle((*box[:2], box[2] - 1, box[3] - 1), int(rng.integers(0, 10)), page.theme.card, page.theme.faint, 1)
    text = page.labels.pop()
    ink = page.theme.faint if rng.random() < 0.6 else page.theme.ink
    if x + 10 + page.width(text) <= end:
        page.write(text, ink, x + 8, y + height // 2)
        page.entries.append(Entry("field", text, box))
    return y + height


def paint_ticks(rng: np.random.Generator, page: Page, x: int, y: int, right: int) -> int:
    """Boxes to tick, or switches, with their labels to the right."""
    half, height = int(page.size * 0.4), page.line + int(rng.integers(0, 8))
    for _ in range(int(rng.integers(1, 3))):
        if not page.labels:
            break
        text, middle = page.labels.pop(), y + height // 2
        page.pen.rounded_rectangle((x, middle - half, x + 2 * half, middle + half), 3, outline=page.theme.faint, width=2)
        if rng.random() < 0.5:
            page.pen.rectangle((x + 4, middle - half + 4, x + 2 * half - 4, middle + half - 4), fill=page.theme.accent)
        left = x + 2 * half + int(page.size * 0.5)
        end = page.write(text, page.theme.ink, left, middle)[2]
        page.entries.append(Entry("checkbox", text, (x, y, end, y + height)))
        y += height
    return y


def paint_tabs(rng: np.random.Generator, page: Page, x: int, y: int, right: int) -> int:
    """Tabs side by side over a line, one of them chosen."""
    height, margin, chosen = page.line + int(rng.integers(6, 18)), int(rng.integers(8, 20)), int(rng.integers(3))
    page.pen.line((x, y + height, right, y + height), fill=page.theme.faint, width=1)
    for place in range(3):
        if not page.labels or x + page.width(page.labels[-1]) + 2 * margin > right + 40:
            break
        text = page.labels.pop()
        box = (x, y, x + page.width(text) + 2 * margin, y + height)
        if place == chosen:
            page.pen.rectangle((x, y + height - 3, box[2], y + height), fill=page.theme.accent)
        page.write(text, page.link_ink if place == chosen else page.theme.ink, x + margin, y + height // 2)
        page.entries.append(Entry("link", text, box))
        x = box[2]
    return y + height


WIDGETS: tuple[Block, ...] = (paint_buttons, paint_links, paint_menu, paint_field, paint_ticks, paint_tabs)
OTHERS: tuple[Block, ...] = (paint_heading, paint_paragraph)


def draw_labels(rng: np.random.Generator, most: int) -> tuple[str, ...]:
    """Texts that differ in more than their case."""
    found: dict[str, str] = {}
    for _ in range(most):
        text = draw_text(rng, LONGEST if rng.random() < 0.7 else 9)
        found.setdefault(text.casefold(), text)
    return tuple(found.values())


def paint_page(rng: np.random.Generator, labels: tuple[str, ...], width: int, height: int) -> Page:
    """A page of this size with as many of the labels as there is room for."""
    theme = draw_theme(rng)
    if rng.random() < 0.5:
        theme = replace(theme, paper=theme.card)
    image, font, size = Image.new("RGB", (width, height), theme.paper), pick(rng, PAGE_FONTS), pick(rng, SIZES)
    page = Page(image, theme, font, size, list(labels), [])
    edge, y = int(rng.integers(2, width // 6)), int(rng.integers(-20, 20))
    while page.labels and y < height:
        x = edge + (int(rng.integers(0, width // 6)) if rng.random() < 0.3 else 0)
        block = pick(rng, WIDGETS if rng.random() < 0.75 else OTHERS)
        y = block(rng, page, x, y, width - int(rng.integers(2, 20))) + int(rng.integers(3, 26))
    return page


def render_page(rng: np.random.Generator, split: str, crowd: int) -> Example:
    """A part of a page with up to `crowd` labels (about twice as many from MANY on) and up to four questions about them."""
    draw = functools.partial(draw_labels, most=2 * MANY if crowd >= MANY else crowd)
    while True:
        labels, content = draw_in_split(draw, lambda labels: "page " + "; ".join(labels), rng, split)
        width, height = (side(int(rng.integers(SIDES[0], SIDES[1] + 1))) for _ in range(2))
        cut = int(rng.integers(0, 60)) if rng.random() < 0.5 else 0
        page = paint_page(rng, labels, width + cut, height)
        page.image, page.entries = _cut(page, cut, cut + width)
        if page.entries:
            break
    return Example((pixels(page.image),), tuple(turns_about(rng, page)), content)


def _cut(page: Page, left: int, right: int) -> tuple[Image.Image, list[Entry]]:
    """The page between two edges, and the widgets that are whole in it."""
    area = (left, 0, right, page.image.height)
    whole = [e for e in page.entries if left <= e.box[0] and 0 <= e.box[1] and e.box[2] <= right and e.box[3] <= area[3]]
    moved = [replace(e, box=(e.box[0] - left, e.box[1], e.box[2] - left, e.box[3])) for e in whole]
    return page.image.crop(area), moved


def turns_about(rng: np.random.Generator, page: Page) -> list[Turn]:
    """Questions by box and by text, of texts that the page shows once, in random order."""
    texts = Counter(entry.text.casefold() for entry in page.entries)
    order = [page.entries[i] for i in rng.permutation(len(page.entries)).tolist()]
    named = [entry for entry in order if texts[entry.text.casefold()] == 1]
    turns = []
    for task, chosen in (("page_referring", named[:ASKED]), ("page_grounding", named[-ASKED:])):
        for entry in chosen:
            box = box_text(entry.box, *page.image.size)
            question = pick(rng, WORDINGS[task]).format(label=entry.text, box=box)
            turns.append(Turn(task, question, entry.text if task == "page_referring" else box))
    return [turns[i] for i in rng.permutation(len(turns)).tolist()]
