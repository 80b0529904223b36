"""Drawings out of packages as pixels: SVG rasterized, cut-outs fitted and placed on made backgrounds."""

import io
import re

import numpy as np
from PIL import Image

from andesvl_jax.data.drawing import background, jittered, neutral
from andesvl_jax.data.examples import pick
from andesvl_jax.errors import UserError

MAX_SVG_BYTES = 4 << 20
OUTSIDE = re.compile(r"""href\s*=\s*["'](?!#|data:)|url\(\s*["']?(?!#|data:)[^)]|<!ENTITY|@import""", re.IGNORECASE)
PALE = ((250, 226, 226), (250, 236, 214), (248, 246, 210), (222, 244, 222), (216, 240, 246), (220, 226, 250), (240, 222, 246))
DARK = ((34, 36, 44), (52, 40, 36), (28, 48, 40), (30, 38, 66))


def svg_of(body: str, width: int, height: int) -> str:
    """A drawing of an icon set, which keeps what is inside the outermost element, as a whole SVG."""
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'


def rasterize(svg: str, width: int, height: int, where: str) -> Image.Image:
    """RGBA pixels of an SVG, fitted into `width` x `height`.

    Raises:
      UserError: which begins with `where`: resvg is missing, the drawing refers to other files, or it cannot be drawn.
    """
    if len(svg) > MAX_SVG_BYTES or OUTSIDE.search(svg):
        raise UserError(f"{where}: refers to other files or is too long, expected a drawing that stands by itself.")
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise UserError(f"{where}: drawings need the package resvg-py; install `andesvl-jax[real]`.") from error
    try:
        data = svg_to_bytes(svg_string=svg, width=width, height=height, skip_system_fonts=True)
        return Image.open(io.BytesIO(data), formats=("PNG",)).convert("RGBA")
    except Exception as error:  # the binding raises several types on drawings that are broken
        raise UserError(f"{where}: cannot be drawn ({error}).") from error


def fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture, in the same mode, at the largest size of its shape that fits; at least one pixel a side."""
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def trimmed(image: Image.Image) -> Image.Image:
    """An RGBA picture without its transparent margin."""
    return image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())


def backdrop(rng: np.random.Generator, width: int, height: int, dark: float = 0.0) -> Image.Image:
    """An RGB background, plain, a gradient or noise: near white, pale, or dark with the chance `dark`."""
    if rng.random() < dark:
        return background(rng, width, height, jittered(rng, pick(rng, DARK)))
    base = neutral(rng) if rng.random() < 0.5 else jittered(rng, pick(rng, PALE), 8)
    return background(rng, width, height, base)


def place(canvas: Image.Image, drawing: Image.Image, x: int, y: int) -> tuple[int, int, int, int]:
    """Pastes an RGBA drawing with its upper left corner at (x, y); returns its box."""
    canvas.paste(drawing, (x, y), drawing)
    return x, y, x + drawing.width, y + drawing.height
