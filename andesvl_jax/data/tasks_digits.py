"""Handwritten digits out of scikit-learn's `load_digits`, enlarged, coloured and, in training, slightly moved.

The split is by index of the digit in the data set: no digit is in both, and the second half is in neither.
"""

import functools

import numpy as np
from PIL import Image

from andesvl_jax.data.drawing import background, contrasting, pixels
from andesvl_jax.data.examples import Example, Turn, pick

WORDINGS = {
    "handwritten": (
        "Which digit is this?",
        "Read the handwritten digit.",
        "What digit was written by hand?",
        "Which digit do you see?",
        "Name the digit.",
        "What is this handwritten digit?",
    ),
}
USABLE = 898
TRAINING = 718
SIDES = (41, 55)  # pixels; both become 2x2 visual tokens
GRID = 8  # pixels per side in the data set
BRIGHTEST = 16
MARGIN = 2  # empty pixels around a digit, so that its strokes end softly


@functools.cache
def load_usable_digits() -> tuple[np.ndarray, np.ndarray]:
    """(images float64 [898, 8, 8] with values 0..16, labels int [898])."""
    from sklearn.datasets import load_digits  # imported late: it costs a second

    digits = load_digits()
    return digits.images[:USABLE], digits.target[:USABLE]  # the rest is a sealed test set


def enlarge(rng: np.random.Generator, digit: np.ndarray, size: int, move: bool) -> Image.Image:
    """An "L" mask of `size` pixels a side; `move` adds a small turn, scale and shift."""
    degrees, scale, shift = 0.0, 0.9, np.zeros(2)
    if move:
        degrees, scale, shift = rng.uniform(-10, 10), rng.uniform(0.75, 1.0), rng.uniform(-0.7, 0.7, 2)
    angle = np.deg2rad(degrees)
    step = GRID / (size * scale)  # pixels of the data set per pixel drawn
    cosine, sine = step * np.cos(angle), step * np.sin(angle)
    centre = size / 2
    # Pillow's coefficients map an output pixel to the place in the input it is read from.
    middle = GRID / 2 + MARGIN
    coefficients = (
        cosine,
        sine,
        middle + shift[0] - centre * (cosine + sine),
        -sine,
        cosine,
        middle + shift[1] - centre * (cosine - sine),
    )
    small = Image.fromarray(np.pad((digit * (255 / BRIGHTEST)).astype(np.uint8), MARGIN))
    return small.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)


def render_handwritten(rng: np.random.Generator, split: str, crowd: int) -> Example:
    """One handwritten digit to name."""
    first, last = (TRAINING, USABLE) if split == "validation" else (0, TRAINING)
    index = int(rng.integers(first, last))
    images, labels = load_usable_digits()
    size = pick(rng, SIDES)
    paper, ink = contrasting(rng)
    image = background(rng, size, size, paper)
    image.paste(ink, (0, 0), enlarge(rng, images[index], size, move=split == "train"))
    turn = Turn("handwritten", pick(rng, WORDINGS["handwritten"]), str(int(labels[index])))
    return Example((pixels(image),), (turn,), f"handwritten {index}")
