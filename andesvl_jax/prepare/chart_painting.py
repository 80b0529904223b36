"""Charts with Pillow: bars, lying bars, lines and pies, laid out so that no text covers another one or leaves the picture.

Shapes are drawn at SUPERSAMPLE times the size and shrunk, texts at their own.
"""

import colorsys
import math
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from andesvl_jax.data.drawing import load_font
from andesvl_jax.data.examples import pick
from andesvl_jax.prepare.tables import Series

STYLES = ("bar", "lying bar", "line", "pie")
HELD_OUT_STYLE = "lollipop"  # a stem with a point on it: never drawn here, for tests of what was never seen
FONTS = ("Aileron", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")
SMALLEST_TEXT, LARGEST_TEXT = 10, 16  # pixels per em
ROOM_FOR_TITLES = 240  # pixels of width
MARGIN = 5  # pixels
SUPERSAMPLE = 2
TICKS = 4
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Look:
    """How a chart is drawn; free of what it shows."""

    style: str  # of STYLES
    width: int  # pixels
    height: int
    font: str
    text: int  # pixels per em
    colours: tuple[Colour, ...]  # one for each number
    paper: Colour
    ink: Colour
    faint: Colour
    grid: bool
    numbers: bool  # written beside the bars, points or slices
    titled: bool


def draw_look(rng: np.random.Generator, series: Series, side: int) -> Look:
    """A style that suits the numbers: lines for what goes on in time, pies only for what has parts."""
    styles = ["line", "line", "bar"] if series.course else ["bar", "lying bar"]
    if not series.course and min(series.values) > 0 and len(series.values) <= 6:
        styles.append("pie")
    style = pick(rng, styles)
    width = int(rng.integers(side * 3 // 4 if side > ROOM_FOR_TITLES else side * 9 // 10, side + 1))
    height = int(rng.integers(width * 3 // 5, min(side, width * 5 // 4) + 1))
    dark = rng.random() < 0.2
    level = int(rng.integers(16, 40)) if dark else int(rng.integers(240, 256))
    largest = LARGEST_TEXT if width >= ROOM_FOR_TITLES else SMALLEST_TEXT + 1
    return Look(
        style=style, width=width, height=height, font=pick(rng, FONTS), text=int(rng.integers(SMALLEST_TEXT, largest + 1)),
        colours=_colours(rng, len(series.values), many=style == "pie" or rng.random() < 0.5),
        paper=(level,) * 3, ink=(235,) * 3 if dark else (25,) * 3, faint=(95,) * 3 if dark else (190,) * 3,
        grid=bool(rng.random() < 0.6), numbers=bool(rng.random() < 0.65), titled=width >= ROOM_FOR_TITLES and rng.random() < 0.6,
    )  # fmt: skip


def _colours(rng: np.random.Generator, count: int, many: bool) -> tuple[Colour, ...]:
    """Hues apart from each other, or one for all."""
    first, saturation, value = rng.random(), 0.45 + 0.5 * rng.random(), 0.6 + 0.3 * rng.random()
    hues = [(first + i / count) % 1 if many else first for i in range(count)]
    return tuple(tuple(int(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value)) for hue in hues)


def written(value: Decimal) -> str:
    """A number in a chart, a question or an answer."""
    return f"{value:f}"


def levels(series: Series, style: str) -> list[Decimal]:
    """The numbers on the axis: from zero, or from below the least where a line stays far above it."""
    low, high = min(Decimal(0), *series.values), max(Decimal(0), *series.values)
    if style == "line" and min(series.values) > high / 2:
        low = min(series.values)
    span = high - low
    unit = Decimal(10) ** (span / TICKS).adjusted()
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor * TICKS >= span)
    first = math.floor(low / step)
    return [step * i for i in range(first, math.ceil(high / step) + 1)]


def paint(series: Series, look: Look) -> Image.Image | None:
    """The chart; None where its texts have no room."""
    page = _Page(look)
    top = MARGIN
    if look.titled:
        title = next((text for text in (series.title, series.unit) if page.width(text) <= look.width - 2 * MARGIN), None)
        if title is None:
            return None
        page.write(title, look.width / 2, top, "ma")
        top += page.line
    return page.finished() if PAINT[look.style](page, series, look, top) else None


class _Page:
    """A picture in the making: shapes, then texts over them."""

    def __init__(self, look: Look):
        self._look = look
        self._font: ImageFont.FreeTypeFont = load_font(look.font, look.text)
        self._large = Image.new("RGB", (look.width * SUPERSAMPLE, look.height * SUPERSAMPLE), look.paper)
        self._draw = ImageDraw.Draw(self._large)
        self._texts: list[tuple[str, float, float, str, Colour, bool]] = []
        self.line = look.text + 4  # pixels from one line of text to the next

    def width(self, text: str) -> int:
        return math.ceil(self._font.getlength(text))

    def widest(self, texts) -> int:
        return max(map(self.width, texts))

    def write(self, text: str, x: float, y: float, anchor: str, colour: Colour | None = None, standing: bool = False) -> None:
        self._texts.append((text, x, y, anchor, colour or self._look.ink, standing))

    def rectangle(self, x1: float, y1: float, x2: float, y2: float, colour: Colour) -> None:
        x1, x2 = sorted((x1, x2))
        y1, y2 = sorted((y1, y2))
        self._draw.rectangle([SUPERSAMPLE * edge for edge in (x1, y1, x2, y2)], fill=colour)

    def path(self, points: list[tuple[float, float]], colour: Colour, width: float) -> None:
        self._draw.line(self._scaled(points), fill=colour, width=round(SUPERSAMPLE * width), joint="curve")

    def dot(self, x: float, y: float, radius: float, colour: Colour) -> None:
        self._draw.ellipse(self._box(x, y, radius), fill=colour)

    def slice(self, x: float, y: float, radius: float, start: float, end: float, colour: Colour) -> None:
        self._draw.pieslice(self._box(x, y, radius), start, end, fill=colour, outline=self._look.paper, width=2)

    def _scaled(self, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(SUPERSAMPLE * x, SUPERSAMPLE * y) for x, y in points]

    def _box(self, x: float, y: float, radius: float) -> list[float]:
        return [SUPERSAMPLE * edge for edge in (x - radius, y - radius, x + radius, y + radius)]

    def finished(self) -> Image.Image:
        image = self._large.reduce(SUPERSAMPLE)
        draw = ImageDraw.Draw(image)
        for text, x, y, anchor, colour, standing in self._texts:
            if standing:  # (x, y) is the middle of its upper end, where it stops
                mask = Image.new("L", (self.width(text), self.line))
                ImageDraw.Draw(mask).text((0, self.line / 2), text, fill=255, font=self._font, anchor="lm")
                image.paste(colour, (round(x - self.line / 2), round(y)), mask.rotate(90, expand=True))
            else:
                draw.text((x, y), text, fill=colour, font=self._font, anchor=anchor)
        return image


def _upright(page: _Page, series: Series, look: Look, top: int) -> bool:
    """Bars and lines: names below, numbers above, the axis at the left."""
    ticks, numbers = levels(series, look.style), [written(value) for value in series.values]
    left = MARGIN + page.widest(map(written, ticks)) + 4
    slot = (look.width - MARGIN - left) / len(numbers)
    standing = page.widest(series.names) + 4 > slot
    below = page.widest(series.names) if standing else page.line
    bottom = look.height - MARGIN - below
    top += page.line  # for the numbers and for half a line of the topmost tick
    if look.titled:
        page.write(series.unit, MARGIN, top - page.line, "la")
        top += page.line
    if bottom - top < max(3 * page.line, look.height / 3) or slot < page.line or len(ticks) * page.line > bottom - top:
        return False
    if look.titled and page.width(series.unit) > look.width - 2 * MARGIN or look.numbers and page.widest(numbers) + 3 > slot:
        return False
    height = lambda value: bottom - float((value - ticks[0]) / (ticks[-1] - ticks[0])) * (bottom - top)  # noqa: E731
    for tick in ticks:
        page.write(written(tick), left - 4, height(tick), "rm")
        if look.grid or tick == 0:
            page.path([(left, height(tick)), (look.width - MARGIN, height(tick))], look.faint, 1)
    points = [(left + slot * (i + 0.5), height(value)) for i, value in enumerate(series.values)]
    if look.style == "line":
        page.path(points, look.colours[0], 2)
    for (x, y), name, shown, value, colour in zip(points, series.names, numbers, series.values, look.colours, strict=True):
        if look.style == "line":
            page.dot(x, y, look.text / 4, look.colours[0])
        else:
            page.rectangle(x - 0.35 * slot, height(max(ticks[0], Decimal(0))), x + 0.35 * slot, y, colour)
        page.write(name, x, bottom + 3, "ma", standing=standing)
        if look.numbers:
            under = value < 0 and look.style != "line"
            page.write(shown, x, y - look.text / 4 - 1 if not under else y + 2, "ma" if under else "mb")
    return not (
        look.numbers and any(value < 0 and y + page.line > bottom for (_, y), value in zip(points, series.values, strict=True))
    )


def _lying(page: _Page, series: Series, look: Look, top: int) -> bool:
    """Lying bars: names at the left, numbers at the right ends, the axis below."""
    ticks, numbers = levels(series, look.style), [written(value) for value in series.values]
    left = MARGIN + page.widest(series.names) + 5
    right = look.width - MARGIN - page.widest(numbers) - 4
    bottom = look.height - MARGIN - page.line * (2 if look.titled else 1)
    slot = (bottom - top) / len(numbers)
    axis = sum(page.width(written(tick)) + look.text for tick in ticks)
    if right - left < look.width / 3 or slot < page.line or axis > right - left + look.text or ticks[0] < 0:
        return False
    if look.titled and page.width(series.unit) > look.width - 2 * MARGIN:
        return False
    place = lambda value: left + float(value / ticks[-1]) * (right - left)  # noqa: E731
    if look.titled:
        page.write(series.unit, look.width / 2, bottom + page.line, "ma")
    for tick in ticks:
        page.write(written(tick), place(tick), bottom + 3, "ma")
        if look.grid or tick == 0:
            page.path([(place(tick), top), (place(tick), bottom)], look.faint, 1)
    for i, (name, shown, value, colour) in enumerate(zip(series.names, numbers, series.values, look.colours, strict=True)):
        y = top + slot * (i + 0.5)
        page.rectangle(place(Decimal(0)), y - 0.35 * slot, place(value), y + 0.35 * slot, colour)
        page.write(name, left - 5, y, "rm")
        if look.numbers:
            page.write(shown, place(value) + 3, y, "lm")
    return True


def _pie(page: _Page, series: Series, look: Look, top: int) -> bool:
    """A pie with its names in a legend at the right, or below, and numbers on its slices."""
    numbers, total = [written(value) for value in series.values], sum(series.values)
    legend = page.widest(series.names) + page.line + MARGIN
    beside = look.width - legend - 3 * MARGIN >= 0.55 * look.width
    rows = page.line * len(numbers)
    width = look.width - 2 * MARGIN - (legend if beside else 0)
    height = look.height - top - MARGIN - (0 if beside else rows)
    radius = min(width, height) / 2
    x, y = MARGIN + width / 2, top + height / 2
    lx, ly = (
        (look.width - legend, (look.height - rows) / 2) if beside else ((look.width - legend) / 2, look.height - MARGIN - rows)
    )
    if radius < 3 * look.text or lx < 0 or ly < top:
        return False
    angle = -90.0
    for i, (name, shown, value, colour) in enumerate(zip(series.names, numbers, series.values, look.colours, strict=True)):
        extent = 360 * float(value / total)
        page.slice(x, y, radius, angle, angle + extent, colour)
        middle, reach = math.radians(angle + extent / 2), 0.68 * radius
        room = 2 * reach * math.sin(math.radians(min(extent, 180) / 2))
        if room < (max(page.width(shown), look.text) + 4 if look.numbers else 4):
            return False
        if look.numbers:
            bright = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 130
            page.write(
                shown, x + reach * math.cos(middle), y + reach * math.sin(middle), "mm", (0,) * 3 if bright else (255,) * 3
            )
        row = ly + page.line * i
        page.rectangle(lx, row + 2, lx + look.text - 2, row + look.text, colour)
        page.write(name, lx + page.line, row + page.line / 2, "lm")
        angle += extent
    return True


PAINT = {"bar": _upright, "lying bar": _lying, "line": _upright, "pie": _pie}
