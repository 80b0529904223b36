"""Drawing pieces shared by the task renderers: fonts, masks, colours, backgrounds, boxes.

Masks (Pillow "L" images cropped to their ink) are cached, so that a picture costs a background and a few pastes.
Sides are 28k - 1: the native-resolution preprocessor pads to the *next* multiple of 28, so that a side of 28k would
become 28(k + 1) and the picture would be rescaled.
"""

import functools
import importlib.util
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from andesvl_jax.data.examples import pick

TOKEN_SIDE = 28  # pixels of a picture under one visual token of `nano`: 2x2 patches of 14
SUPERSAMPLE = 4
COLOURS = {
    "red": (222, 32, 32),
    "orange": (255, 138, 0),
    "yellow": (248, 224, 24),
    "green": (28, 158, 56),
    "cyan": (0, 204, 224),
    "blue": (32, 64, 224),
    "purple": (150, 40, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
FONTS = ("Aileron", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif")
Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels; x2 and y2 lie just outside


def side(tokens: int) -> int:
    """Pixels of a picture side that becomes `tokens` visual tokens with almost no rescaling."""
    return TOKEN_SIDE * tokens - 1


@functools.cache
def font_folder() -> Path:
    """Folder of the DejaVu fonts that ship inside matplotlib, found without importing it."""
    origin = importlib.util.find_spec("matplotlib").origin
    return Path(origin).parent / "mpl-data" / "fonts" / "ttf"


@functools.cache
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of FONTS at `size` pixels per em; Aileron is the one inside Pillow."""
    if name == "Aileron":
        return ImageFont.load_default(size)
    return ImageFont.truetype(str(font_folder() / f"{name}.ttf"), size, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=4096)
def text_mask(text: str, font: str, size: int) -> Image.Image:
    """Ink of `text` as an "L" image cropped to it; do not modify it, it is cached."""
    typeface = load_font(font, size)
    left, top, right, bottom = (int(edge) for edge in typeface.getbbox(text))
    mask = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(mask).text((2 - left, 2 - top), text, fill=255, font=typeface)
    return mask.crop(mask.getbbox())


@functools.lru_cache(maxsize=32_768)
def glyph(character: str, font: str, size: int) -> tuple[np.ndarray, int, int, int]:
    """(ink uint8 [height, width], pixels from the pen to its left edge, from the top of the line to its top, to the next pen)."""
    typeface = load_font(font, size)
    left, top, right, bottom = (int(edge) for edge in typeface.getbbox(character))
    mask = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(mask).text((2 - left, 2 - top), character, fill=255, font=typeface)
    box = mask.getbbox() or (2, 2, 3, 3)  # a space has none
    return np.asarray(mask.crop(box)), left + box[0] - 2, top + box[1] - 2, round(typeface.getlength(character))


def print_width(text: str, font: str, size: int) -> int:
    """Pixels that the pen moves by for `text`, without kerning."""
    return sum(glyph(character, font, size)[3] for character in text)


def print_mask(text: str, font: str, size: int, pitch: int = 0) -> Image.Image:
    """Ink of `text` as an "L" image cropped to it, set from cached glyphs: fast for texts that never come twice.

    pitch: pixels from the middle of a character to that of the next; 0: as the font has them, without kerning.
    """
    pen, placed = 0, []
    for character in text:
        ink, left, top, advance = glyph(character, font, size)
        if character != " ":
            placed.append((ink, pen + ((pitch - ink.shape[1]) // 2 if pitch else left), top))
        pen += pitch or advance
    first, highest = min(x for _, x, _ in placed), min(y for _, _, y in placed)
    width = max(x + ink.shape[1] for ink, x, _ in placed) - first
    height = max(y + ink.shape[0] for ink, _, y in placed) - highest
    line = np.zeros((height, width), np.uint8)
    for ink, x, y in placed:
        part = line[y - highest : y - highest + ink.shape[0], x - first : x - first + ink.shape[1]]
        np.maximum(part, ink, out=part)
    return Image.fromarray(line)


def turned(mask: Image.Image, degrees: float) -> Image.Image:
    """The mask rotated counter-clockwise and cropped to its ink."""
    if degrees == 0:
        return mask
    rotated = mask.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    return rotated.crop(rotated.getbbox())


def shape_outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape in the unit square [-1, 1]^2; a circle is a polygon of 48 corners."""
    if shape == "square":
        return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    if shape == "triangle":
        return [(0, -1), (1, 0.9), (-1, 0.9)]
    if shape == "cross":
        arm = 0.34
        return [
            (-arm, -1),
            (arm, -1),
            (arm, -arm),
            (1, -arm),
            (1, arm),
            (arm, arm),
            (arm, 1),
            (-arm, 1),
            (-arm, arm),
            (-1, arm),
            (-1, -arm),
            (-arm, -arm),
        ]
    corners, inner = (10, 0.42) if shape == "star" else (48, 1.0)
    radii = [1.0 if corner % 2 == 0 else inner for corner in range(corners)]
    angles = [2 * math.pi * corner / corners - math.pi / 2 for corner in range(corners)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)]


@functools.lru_cache(maxsize=2048)
def shape_mask(shape: str, size: int, degrees: int = 0) -> Image.Image:
    """A filled, antialiased shape about `size` pixels wide as an "L" image cropped to its ink; cached."""
    radius, margin = size * SUPERSAMPLE / 2, size
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    centre = radius + margin
    corners = [
        (centre + radius * (x * cosine - y * sine), centre + radius * (x * sine + y * cosine)) for x, y in shape_outline(shape)
    ]
    pixels = int(2 * centre) // SUPERSAMPLE * SUPERSAMPLE
    large = Image.new("L", (pixels, pixels))
    ImageDraw.Draw(large).polygon(corners, fill=255)
    mask = large.reduce(SUPERSAMPLE)
    return mask.crop(mask.getbbox())


def stamp(image: Image.Image, mask: Image.Image, colour: tuple[int, int, int], x: int, y: int) -> Box:
    """Paint `colour` through `mask` with its upper left corner at (x, y); returns the box it fills."""
    image.paste(colour, (x, y), mask)
    return x, y, x + mask.width, y + mask.height


def jittered(rng: np.random.Generator, colour: tuple[int, int, int], amount: int = 14) -> tuple[int, int, int]:
    """The colour with every channel moved by at most `amount`."""
    return tuple(np.clip(np.add(colour, rng.integers(-amount, amount + 1, 3)), 0, 255).tolist())


def contrasting(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(background, ink): a light colour and a dark one."""
    return tuple(rng.integers(200, 256, 3).tolist()), tuple(rng.integers(0, 90, 3).tolist())


def neutral(rng: np.random.Generator) -> tuple[int, int, int]:
    """A light greyish background on which every one of COLOURS stands out."""
    level = int(rng.integers(215, 250))
    return jittered(rng, (level, level, level), 6)


def background(rng: np.random.Generator, width: int, height: int, base: tuple[int, int, int]) -> Image.Image:
    """An RGB picture around `base`: plain, a gradient across or down, or noise, with equal chance."""
    kind = int(rng.integers(3))
    if kind == 0:
        return Image.new("RGB", (width, height), base)
    if kind == 1:
        across = rng.random() < 0.5
        change = rng.integers(-28, 29, 3)
        steps = np.linspace(-0.5, 0.5, width if across else height)[:, None]
        ramp = np.clip(np.asarray(base) + steps * change, 0, 255).astype(np.uint8)
        line = ramp[None, :] if across else ramp[:, None]
        return Image.fromarray(np.ascontiguousarray(np.broadcast_to(line, (height, width, 3))))
    amount = int(rng.integers(6, 21))
    floor = np.clip(np.asarray(base) - amount // 2, 0, 255 - amount).astype(np.uint8)
    noise = rng.integers(0, amount + 1, (height, width, 1), dtype=np.uint8)
    return Image.fromarray(floor + noise)


def pixels(image: Image.Image) -> np.ndarray:
    """The picture as a uint8 [height, width, 3] array."""
    return np.array(image)


def box_text(box: Box, width: int, height: int) -> str:
    """A box in AndesVL's format: integers 0..1000 of the picture's width and height."""
    x1, y1, x2, y2 = box
    across, down = 1000 / width, 1000 / height
    return f"<|box_start|>({int(x1 * across)},{int(y1 * down)}),({int(x2 * across)},{int(y2 * down)})<|box_end|>"


def picture_size(rng: np.random.Generator, sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """One (width, height) in pixels out of sizes given in visual tokens."""
    columns, rows = pick(rng, sizes)
    return side(columns), side(rows)
