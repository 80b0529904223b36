"""Small print: lines of words, names, numbers and random characters, as close as print is, anywhere on the picture.

Several letters stand on a visual token, so that an encoder has to read inside of it. That is learned in steps: random characters
a token apart, then closer and closer, then at the font's own pitch, and only then words, which a model would guess from a few of
their letters. The content is the text itself, whatever its looks.
"""

import string
from collections.abc import Callable, Sequence

import numpy as np

from andesvl_jax.data.drawing import (
    FONTS,
    TOKEN_SIDE,
    background,
    contrasting,
    glyph,
    pixels,
    print_mask,
    print_width,
    side,
    stamp,
)
from andesvl_jax.data.english import words
from andesvl_jax.data.examples import Example, Turn, draw_in_split, pick

WORDINGS = {
    "line": (
        "Read the line.",
        "Which text is printed here?",
        "What does the line say?",
        "Read the small print.",
        "What text do you see?",
    ),
    "lines": (
        "Read every line.",
        "Write down all lines.",
        "What do the lines say?",
        "Read the text from top to bottom.",
        "Which lines are printed here?",
    ),
}
PRINT_FONTS = (*FONTS, "DejaVuSansMono", "DejaVuSerif-Bold", "STIXGeneral", "STIXGeneralBol")
SIZES = tuple(range(16, 35, 2))  # pixels per em
LARGE = SIZES[3:]  # at the first two levels
WIDEST = side(10) - 4  # pixels
LINES = 4  # of the fullest picture
PITCHES = {1: (TOKEN_SIDE, TOKEN_SIDE), 2: (24, 28), 3: (18, 26), 4: (12, 20)}  # pixels between characters, of the levels below
SPACED, OWN_PITCH = 4, 5  # the last levels with a wide pitch, and with random characters alone
EASIER = 0.4  # share of the pictures that are of any level up to theirs
LETTERS = string.ascii_letters + string.digits


def draw_text(rng: np.random.Generator, most: int) -> str:
    """Words in one of the usual cases, a number with marks, or random characters, at most `most` of them."""
    kind = rng.random()
    if kind < 0.3:
        length = int(rng.integers(2, min(most, 9) + 1))
        letters = pick(rng, (LETTERS, string.ascii_lowercase, string.ascii_uppercase, string.ascii_uppercase))
        return "".join(letters[i] for i in rng.integers(len(letters), size=length).tolist())
    if kind < 0.42:
        number = str(int(rng.integers(10 ** int(rng.integers(1, 6)))))
        written = pick(rng, ("{}", "{}%", "${}", "#{}", "{}:{}", "{}.{}", "{}/{}", "v{}.{}", "({})", "+{}", "{} {}"))
        return written.format(number, int(rng.integers(100)), number)[:most].strip()
    case: Callable[[str], str] = pick(rng, (str.lower, str.capitalize, str.capitalize, str.title, str.upper))
    found = [pick(rng, words()) for _ in range(pick(rng, (1, 1, 1, 2, 2, 3)))]
    text = case(" ".join(found))
    if rng.random() < 0.15:
        text = pick(rng, ("{}?", "{}!", "{}...", "{}:", "{} {}", "{} & {}", "{}-{}", "{}'s")).format(text, pick(rng, words()))
    while len(text) > most:  # whole words, if there are several
        text = text.rpartition(" ")[0] or text[:most]
    return text.strip() or "a"


def draw_characters(rng: np.random.Generator, level: int) -> str:
    """Two to nine random characters: capitals and digits at first, small letters from the second level on."""
    kinds = (string.ascii_uppercase, string.ascii_uppercase + string.digits, string.ascii_lowercase, LETTERS)
    letters = pick(rng, kinds[:2] if level == 1 else kinds)
    return "".join(letters[i] for i in rng.integers(len(letters), size=int(rng.integers(2, 10))).tolist())


def largest_size(texts: Sequence[str], font: str, size: int, pitch: int) -> int:
    """The size, or the next smaller one at which characters fit their pitch, or lines the widest picture."""
    for smaller in range(size, 7, -2):
        if pitch:
            fits = all(glyph(character, font, smaller)[0].shape[1] <= pitch for character in "".join(texts))
        else:
            fits = max(print_width(text, font, smaller) for text in texts) <= WIDEST
        if fits:
            return smaller
    raise ValueError(f"font {font} draws {texts!r} too wide at every size")


def render_lines(rng: np.random.Generator, split: str, crowd: int) -> Example:
    """A line of characters of the level `crowd`, or of an easier one; at the last level one to four lines of anything."""
    level = int(rng.integers(1, crowd + 1)) if rng.random() < EASIER else crowd
    free = level > OWN_PITCH
    count = pick(rng, (1, 1, 1, 2, 3, LINES)) if free else 1

    def draw(rng: np.random.Generator) -> tuple[str, ...]:
        return tuple(draw_text(rng, 24) if free else draw_characters(rng, level) for _ in range(count))

    texts, content = draw_in_split(draw, lambda texts: "lines " + "\n".join(texts), rng, split)
    font, pitch = pick(rng, PRINT_FONTS), 0
    if level <= SPACED:
        low, high = PITCHES[level]
        pitch = int(rng.integers(low, high + 1))
    size = largest_size(texts, font, pick(rng, LARGE if level <= 2 else SIZES), pitch)
    masks = [print_mask(text, font, size, pitch) for text in texts]
    gap, loose = int(rng.integers(4, 14)), 0 if level == 1 else 30
    widest, total = max(mask.width for mask in masks), sum(mask.height + gap for mask in masks) - gap
    paper, ink = contrasting(rng)
    if rng.random() < 0.3:
        paper, ink = ink, paper
    width, height = (min(side(10), _tokens(length + int(rng.integers(loose + 1)))) for length in (widest, total))
    image = background(rng, width, height, paper)
    left, y = (int(rng.integers(room + 1)) for room in (image.width - widest, image.height - total))
    for mask in masks:
        stamp(image, mask, ink, left, y)
        y += mask.height + gap
    task = "line" if count == 1 else "lines"
    return Example((pixels(image),), (Turn(task, pick(rng, WORDINGS[task]), "\n".join(texts)),), content)


def _tokens(length: int) -> int:
    """The side of a picture of whole visual tokens that holds `length` pixels."""
    return side(max(1, -(-(length + 1) // TOKEN_SIDE)))
