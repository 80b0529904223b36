"""Long contexts of pictures: documents of several pages of which a line is asked, and which of several pictures shows a thing.

A character of a page and a thing of a scene stand on one visual token each, as in the short tasks; a line is one row of tokens.
Rows are the units that fill a length: pictures of one example differ in height by at most one row.
"""

from dataclasses import dataclass, field

import numpy as np

from andesvl_jax.data.drawing import COLOURS, FONTS, SHAPES, TOKEN_SIDE, background, contrasting, neutral, pixels, side, stamp
from andesvl_jax.data.examples import Turn, draw_in_split, pick
from andesvl_jax.data.long_context.layout import MOST_QUESTIONS, Sketch, questions_of, spread
from andesvl_jax.data.long_context.words import unused
from andesvl_jax.data.tasks_shapes import Thing, paint
from andesvl_jax.data.tasks_text import ENGLISH, SIZES, WORD_ALPHABET, character_mask

LINE_OF_PAGE = ("What stands in line {} of page {}?", "What does line {} of page {} say?", "Read line {} of page {}.")
WHICH_PICTURE = (
    "Which picture shows the {} {}?",
    "In which picture is the {} {}?",
    "Give the number of the picture with the {} {}.",
)
FEWEST_PICTURES, MOST_PICTURES = 2, 8
MOST_TOKENS = 512  # of a picture: the releases' budget of 733^2 pixels holds it
LONGEST_WORD = 4
WIDER_LINES = (512, 2048)  # tokens of an example from which on a line has one word more
FEWEST_LINES = 2  # of a page
FEWEST_COLUMNS, FEWEST_ROWS = 4, 3  # of a scene
THINGS = (3, 5)  # of a scene, unless more are asked for
KINDS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
Kind = tuple[str, str]


@dataclass(frozen=True)
class Pages:
    """The plan of `pages`: a line has `words` words, a page as many lines as fill the length; `places` in 0..1 are asked."""

    words: int
    pages: int
    split: str
    places: tuple[float, ...]
    wordings: tuple[str, ...]
    rng: np.random.Generator  # of the lines
    seed: int  # of their looks
    drawn: list[str] = field(default_factory=list)

    @property
    def questions(self) -> int:
        return len(self.places)

    def sketch(self, questions: int, units: int) -> Sketch:
        total = max(FEWEST_LINES * self.pages, MOST_QUESTIONS) + units
        lines = _dealt(self._lines(total), self.pages)
        numbers = [(page, line) for page, texts in enumerate(lines, start=1) for line in range(1, len(texts) + 1)]
        turns = []
        for place, wording in zip(self.places[:questions], self.wordings):
            page, line = numbers[asked := int(place * total)]
            turns.append(Turn("pages", wording.format(line, page), self.drawn[asked], (asked / total,)))
        columns = (LONGEST_WORD + 1) * self.words - 1
        sizes = tuple((side(columns), side(len(texts))) for texts in lines)
        content = "pages " + "; ".join(sorted(turn.answer for turn in turns))
        return Sketch("", tuple(turns), content, sizes, lambda: _pages(lines, sizes, self.seed))

    def _lines(self, number: int) -> list[str]:
        taken = set(self.drawn)
        while len(self.drawn) < number:
            self.drawn.append(unused(self._line, self.rng, taken))
            taken.add(self.drawn[-1])
        return self.drawn[:number]

    def _line(self, rng: np.random.Generator) -> str:
        return draw_in_split(self._text, str, rng, self.split)[0]

    def _text(self, rng: np.random.Generator) -> str:
        return " ".join(_word(rng) for _ in range(self.words))


def pages(rng: np.random.Generator, split: str, tokens: int) -> Pages:
    """A document of 2 to 8 pages, lines of capitals; asked are lines by number."""
    number = questions_of(rng)
    places = tuple(place for (place,) in spread(rng, [1] * number))
    wordings = tuple(pick(rng, LINE_OF_PAGE) for _ in range(number))
    words = 1 + sum(tokens >= edge for edge in WIDER_LINES)
    return Pages(words, _how_many(rng, tokens), split, places, wordings, rng, int(rng.integers(1 << 32)))


@dataclass(frozen=True)
class Scenes:
    """The plan of `which_picture`: scenes as (colour, shape) without places, asked kinds with the scene each is in."""

    columns: int
    scenes: tuple[tuple[Kind, ...], ...]
    asked: tuple[tuple[Kind, int, str], ...]  # kind, scene, wording
    seed: int

    @property
    def questions(self) -> int:
        return len(self.asked)

    def sketch(self, questions: int, units: int) -> Sketch:
        rows = [len(part) for part in _dealt(range(FEWEST_ROWS * len(self.scenes) + units), len(self.scenes))]
        sizes = tuple((side(self.columns), side(height)) for height in rows)
        turns = tuple(
            Turn("which_picture", wording.format(*kind), str(scene + 1), ((scene + 0.5) / len(self.scenes),))
            for kind, scene, wording in self.asked[:questions]
        )
        return Sketch("", turns, _described(self.scenes), sizes, lambda: _scenes(self.scenes, self.columns, sizes, self.seed))


def which_picture(rng: np.random.Generator, split: str, tokens: int) -> Scenes:
    """2 to 8 pictures of coloured shapes; a kind that is asked for stands in one of them, others of its colour or shape too."""
    number, pictures = questions_of(rng), _how_many(rng, tokens)
    columns = max(FEWEST_COLUMNS, round((tokens / pictures) ** 0.5))
    (scenes, asked), _ = draw_in_split(
        lambda rng: _draw_scenes(rng, number, pictures), lambda drawn: _described(drawn[0]), rng, split
    )
    wordings = [pick(rng, WHICH_PICTURE) for _ in asked]
    asked = tuple((kind, scene, wording) for (kind, scene), wording in zip(asked, wordings, strict=True))
    return Scenes(columns, scenes, asked, int(rng.integers(1 << 32)))


def _how_many(rng: np.random.Generator, tokens: int) -> int:
    return int(rng.integers(min(MOST_PICTURES, max(FEWEST_PICTURES, -(-tokens // MOST_TOKENS))), MOST_PICTURES + 1))


def _dealt(things, parts: int) -> list:
    """The things in order, in parts of which the first ones have one more where it does not come out even."""
    size, more = divmod(len(things), parts)
    edges = [i * size + min(i, more) for i in range(parts + 1)]
    return [things[start:end] for start, end in zip(edges, edges[1:])]


def _word(rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        return pick(rng, ENGLISH)
    return "".join(pick(rng, WORD_ALPHABET) for _ in range(int(rng.integers(2, LONGEST_WORD + 1))))


def _pages(lines: list[list[str]], sizes: tuple[tuple[int, int], ...], seed: int) -> tuple[np.ndarray, ...]:
    """uint8 [height, width, 3] of each page: all in one font and size, a character on each visual token."""
    rng = np.random.default_rng(seed)
    font, size, (paper, ink) = pick(rng, FONTS), pick(rng, SIZES), contrasting(rng)
    out = []
    for texts, (width, height) in zip(lines, sizes, strict=True):
        image = background(rng, width, height, paper)
        for row, text in enumerate(texts):
            for column, character in enumerate(text):
                if character == " ":
                    continue
                mask = character_mask(character, font, size, 0.0)
                x, y = ((TOKEN_SIDE - 1 - length) // 2 for length in mask.size)
                stamp(image, mask, ink, TOKEN_SIDE * column + x, TOKEN_SIDE * row + y)
        out.append(pixels(image))
    return tuple(out)


def _draw_scenes(
    rng: np.random.Generator, number: int, pictures: int
) -> tuple[tuple[tuple[Kind, ...], ...], tuple[tuple[Kind, int], ...]]:
    """(scenes, asked kinds with their scene): each of them in no other scene, but in the next one a kind like it."""
    kinds = [KINDS[i] for i in rng.permutation(len(KINDS))]
    free = kinds[number:]
    homes = [order for _ in range(-(-number // pictures)) for order in rng.permutation(pictures).tolist()]
    asked = tuple(zip(kinds[:number], homes, strict=False))
    scenes: list[list[Kind]] = [[] for _ in range(pictures)]
    for (colour, shape), home in asked:
        scenes[home].append((colour, shape))
        scenes[(home + 1) % pictures].append(pick(rng, [kind for kind in free if kind[0] == colour or kind[1] == shape]))
    for scene in scenes:
        scene += [pick(rng, free) for _ in range(int(rng.integers(THINGS[0], THINGS[1] + 1)) - len(scene))]
    return tuple(tuple(scene) for scene in scenes), asked


def _described(scenes: tuple[tuple[Kind, ...], ...]) -> str:
    return "which_picture " + " | ".join("; ".join(sorted(" ".join(kind) for kind in scene)) for scene in scenes)


def _scenes(
    scenes: tuple[tuple[Kind, ...], ...], columns: int, sizes: tuple[tuple[int, int], ...], seed: int
) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    out = []
    for scene, (width, height) in zip(scenes, sizes, strict=True):
        image = background(rng, width, height, neutral(rng))
        cells = rng.permutation(columns * ((height + 1) // TOKEN_SIDE))[: len(scene)].tolist()
        for (colour, shape), cell in zip(scene, cells, strict=True):
            paint(rng, columns, Thing(colour, shape, cell), image)
        out.append(pixels(image))
    return tuple(out)
