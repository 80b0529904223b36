"""Pictures of several named things, and questions on how many, which, where, in five languages.

Names stand in quotation marks, so that no language has to inflect them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from andesvl_jax.data.drawing import TOKEN_SIDE, box_text
from andesvl_jax.data.examples import Turn, pick
from andesvl_jax.prepare.drawings import backdrop, fitted, place
from andesvl_jax.prepare.items import Item, jpeg, split_of

LANGUAGES = ("en", "zh", "de", "ru", "es")
SMALLEST_CELL = 36  # pixels: a drawing of 26 pixels and more is still told from another
CELLS = 3  # across and down, at most
TOTAL = {
    "en": ("How many pictures are there?", "Count all the drawings.", "What is the number of things shown?"),
    "zh": ("图中一共有几个图案？", "数一数所有的图案。", "总共有多少个？"),
    "de": ("Wie viele Bilder sind zu sehen?", "Zähle alle Zeichnungen.", "Wie viele sind es insgesamt?"),
    "ru": ("Сколько здесь рисунков?", "Сосчитай все рисунки.", "Сколько всего предметов?"),
    "es": ("¿Cuántos dibujos hay?", "Cuenta todos los dibujos.", "¿Cuántos hay en total?"),
}
COUNT = {
    "en": ("How many times does “{name}” appear?", "Count “{name}”.", "How often do you see “{name}”?"),
    "zh": ("“{name}”出现了几次？", "数一数“{name}”。", "图中有几个“{name}”？"),
    "de": ("Wie oft kommt „{name}“ vor?", "Zähle „{name}“.", "Wie oft siehst du „{name}“?"),
    "ru": ("Сколько раз встречается «{name}»?", "Сосчитай «{name}».", "Сколько раз ты видишь «{name}»?"),
    "es": ("¿Cuántas veces aparece «{name}»?", "Cuenta «{name}».", "¿Cuántas veces ves «{name}»?"),
}
AT = {
    "en": ("What is at the {place}?", "Which one is at the {place}?", "Name the picture at the {place}."),
    "zh": ("{place}是什么？", "{place}的图案叫什么？", "请说出{place}的图案。"),
    "de": ("Was ist {place}?", "Welches Bild ist {place}?", "Nenne das Bild {place}."),
    "ru": ("Что находится {place}?", "Какой рисунок {place}?", "Назови рисунок {place}."),
    "es": ("¿Qué hay {place}?", "¿Qué dibujo está {place}?", "Nombra el dibujo que está {place}."),
}
BESIDE = {
    "en": ("What is directly {side} “{name}”?", "Which one is next {side} “{name}”?"),
    "zh": ("紧挨着“{name}”{side}的是什么？", "“{name}”的{side}是什么？"),
    "de": ("Was ist direkt {side} „{name}“?", "Welches Bild ist gleich {side} „{name}“?"),
    "ru": ("Что находится сразу {side} «{name}»?", "Какой рисунок прямо {side} «{name}»?"),
    "es": ("¿Qué hay justo {side} «{name}»?", "¿Qué dibujo está justo {side} «{name}»?"),
}
WHERE = {
    "en": ("Where is “{name}”?", "In which part of the picture is “{name}”?"),
    "zh": ("“{name}”在哪里？", "“{name}”在图的哪个位置？"),
    "de": ("Wo ist „{name}“?", "In welchem Teil des Bildes ist „{name}“?"),
    "ru": ("Где «{name}»?", "В какой части картинки «{name}»?"),
    "es": ("¿Dónde está «{name}»?", "¿En qué parte de la imagen está «{name}»?"),
}
BOX = {
    "en": (
        "Locate <|object_ref_start|>{name}<|object_ref_end|>.",
        "Give the box of <|object_ref_start|>{name}<|object_ref_end|>.",
    ),
    "zh": ("请框出<|object_ref_start|>{name}<|object_ref_end|>。",),
    "de": ("Finde <|object_ref_start|>{name}<|object_ref_end|>.",),
    "ru": ("Найди <|object_ref_start|>{name}<|object_ref_end|>.",),
    "es": ("Localiza <|object_ref_start|>{name}<|object_ref_end|>.",),
}
_PLACES = ("top left", "top right", "bottom left", "bottom right", "left", "right", "top", "bottom")
PLACES: dict[str, dict[str, str]] = {
    language: dict(zip(_PLACES, words, strict=True))
    for language, words in {
        "en": _PLACES,
        "zh": ("左上角", "右上角", "左下角", "右下角", "左边", "右边", "上面", "下面"),
        "de": ("oben links", "oben rechts", "unten links", "unten rechts", "links", "rechts", "oben", "unten"),
        "ru": ("слева вверху", "справа вверху", "слева внизу", "справа внизу", "слева", "справа", "вверху", "внизу"),
        "es": (
            "arriba a la izquierda", "arriba a la derecha", "abajo a la izquierda", "abajo a la derecha", "a la izquierda",
            "a la derecha", "arriba", "abajo",
        ),
    }.items()
}  # fmt: skip
SIDES = {  # where the asked one is, seen from the named one: (rows down, columns right) -> words
    "en": {(0, -1): "to the left of", (0, 1): "to the right of", (-1, 0): "above", (1, 0): "below"},
    "zh": {(0, -1): "左边", (0, 1): "右边", (-1, 0): "上面", (1, 0): "下面"},
    "de": {(0, -1): "links von", (0, 1): "rechts von", (-1, 0): "über", (1, 0): "unter"},
    "ru": {(0, -1): "слева от", (0, 1): "справа от", (-1, 0): "над", (1, 0): "под"},
    "es": {(0, -1): "a la izquierda de", (0, 1): "a la derecha de", (-1, 0): "encima de", (1, 0): "debajo de"},
}


@dataclass(frozen=True, eq=False)  # a thing is itself
class Thing:
    """Something drawn that has a name in each of the languages it is asked in."""

    key: str  # as in `Item.keys`
    names: Mapping[str, str]  # language -> name
    draw: Callable[[int], Image.Image]  # side in pixels -> RGBA that fits it


def picture_sides(side: int, cells: int = 1) -> list[int]:
    """Largest sides in pixels, one less than whole visual tokens, that give every cell room enough; `side` where none does."""
    sides = range(2 * TOKEN_SIDE - 1, side + 1, TOKEN_SIDE)
    return [length for length in sides if length >= cells * SMALLEST_CELL] or [side]


def naming_item(
    rng: np.random.Generator, thing: Thing, turns: Sequence[Turn], content: str, language: str, side: int, dark: float = 0.0
) -> Item:
    """One thing alone, of random size and place, with what is asked about it."""
    length = pick(rng, picture_sides(side))
    canvas = backdrop(rng, length, length, dark)
    _put(rng, canvas, thing, (0, 0, length, length))
    return Item(jpeg(canvas), tuple(turns), content, split_of(content), (thing.key, f"language:{language}"))


def counting_item(
    rng: np.random.Generator, things: Sequence[Thing], language: str, side: int, task: str, dark: float = 0.0
) -> Item:  # fmt: skip
    """One to nine drawings of up to three kinds out of `things`; exact counts, of a kind that is absent too."""
    kinds = [things[i] for i in rng.choice(len(things), 4, replace=False).tolist()]
    cells = int(rng.integers(2, CELLS + 1))
    total = int(rng.integers(1, cells * cells + 1))
    present, absent = kinds[: int(rng.integers(1, 4))], kinds[3]
    shown = [pick(rng, present) for _ in range(total)]
    length = pick(rng, picture_sides(side, cells))
    canvas = backdrop(rng, length, length, dark)
    for thing, cell in zip(shown, rng.permutation(cells * cells)[:total].tolist(), strict=True):
        _put(rng, canvas, thing, _cell(length // cells, *divmod(cell, cells)))
    asked = [*dict.fromkeys(shown)] + [absent] * (rng.random() < 0.25)
    turns = [Turn(task, pick(rng, TOTAL[language]), str(total))] if rng.random() < 0.5 else []
    for index in rng.permutation(len(asked))[:3].tolist():
        wording, thing = pick(rng, COUNT[language]), asked[index]
        turns.append(Turn(task, wording.format(name=thing.names[language]), str(shown.count(thing))))
    content = "count " + ", ".join(sorted(f"{thing.key} x{shown.count(thing)}" for thing in set(shown)))
    return Item(jpeg(canvas), tuple(turns), content, split_of(content), _keys([*shown, absent], language))


def placing_item(
    rng: np.random.Generator, things: Sequence[Thing], language: str, side: int, task: str, dark: float = 0.0
) -> Item:  # fmt: skip
    """Different drawings on a grid of 1 to 3 by 1 to 3 cells: which is where, which is beside which, its box."""
    rows, columns = pick(rng, ((1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (2, 2), (2, 3), (3, 2), (3, 3)))
    shown = [things[i] for i in rng.choice(len(things), rows * columns, replace=False).tolist()]
    cell = pick(rng, picture_sides(side, max(rows, columns))) // max(rows, columns)
    width, height = columns * cell, rows * cell
    canvas = backdrop(rng, width, height, dark)
    boxes = [_put(rng, canvas, thing, _cell(cell, *divmod(i, columns))) for i, thing in enumerate(shown)]
    names = [thing.names[language] for thing in shown]
    places = _named_places(rows, columns)
    turns = []
    for place_, i in places.items():
        word = PLACES[language][place_]
        turns.append(Turn(task, pick(rng, AT[language]).format(place=word), names[i]))
        turns.append(Turn(task, pick(rng, WHERE[language]).format(name=names[i]), word))
    for (down, right), side_ in SIDES[language].items():
        for i, name in enumerate(names):
            row, column = i // columns + down, i % columns + right
            if 0 <= row < rows and 0 <= column < columns:
                wording = pick(rng, BESIDE[language]).format(side=side_, name=name)
                turns.append(Turn(task, wording, names[row * columns + column]))
    i = int(rng.integers(len(shown)))
    turns.append(Turn(f"{task}_box", pick(rng, BOX[language]).format(name=names[i]), box_text(boxes[i], width, height)))
    chosen = [turns[i] for i in rng.permutation(len(turns))[:4].tolist()]
    content = f"grid {rows}x{columns} " + ", ".join(thing.key for thing in shown)
    return Item(jpeg(canvas), tuple(chosen), content, split_of(content), _keys(shown, language))


def _named_places(rows: int, columns: int) -> dict[str, int]:
    """Place -> cell, of the corners, or of the ends of a row or column."""
    last, count = columns - 1, rows * columns
    if rows == 1:
        return {"left": 0, "right": last}
    if columns == 1:
        return {"top": 0, "bottom": count - 1}
    return {"top left": 0, "top right": last, "bottom left": count - columns, "bottom right": count - 1}


def _cell(length: int, row: int, column: int) -> tuple[int, int, int, int]:
    return column * length, row * length, (column + 1) * length, (row + 1) * length


def _put(
    rng: np.random.Generator, canvas: Image.Image, thing: Thing, cell: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:  # fmt: skip
    """Draws the thing at 70 to 95 % of its cell's side, somewhere inside; returns its box."""
    left, top, right, bottom = cell
    room = min(right - left, bottom - top)
    drawing = thing.draw(max(1, int(room * rng.uniform(0.7, 0.95))))
    x, y = (int(rng.integers(0, space + 1)) for space in (right - left - drawing.width, bottom - top - drawing.height))
    return place(canvas, drawing, left + x, top + y)


def _keys(things: Sequence[Thing], language: str) -> tuple[str, ...]:
    return (*dict.fromkeys(thing.key for thing in things), f"language:{language}")


def drawer(large: Callable[[], Image.Image]) -> Callable[[int], Image.Image]:
    """`Thing.draw` from a function that gives the drawing at a large size, called once."""
    kept: list[Image.Image] = []

    def draw(side: int) -> Image.Image:
        if not kept:
            kept.append(large())
        return fitted(kept[0], side, side)

    return draw
