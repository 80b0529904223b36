"""Maps of KGeography with a few regions coloured: which region has a colour, its capital, the colour of a region, its box."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from andesvl_jax.data.drawing import COLOURS, TOKEN_SIDE, box_text, jittered
from andesvl_jax.data.examples import Turn, pick
from andesvl_jax.errors import UserError
from andesvl_jax.prepare.drawings import fitted
from andesvl_jax.prepare.items import Card, Item, LeftOut, png, split_of
from andesvl_jax.prepare.packages import Package, members

MAPS = Package(
    "deb",
    "kgeography-data",
    "4:22.12.3-1",
    10_865_148,
    "1cdaf45dea7cbf1682a05109b4e9299934f0a60ca8866fa957cf4d9dcfe3982a",
    "GPL-2+",
)
CARD = Card(
    "maps",
    "Maps with some regions coloured: the region of a colour, its capital, the colour and place of a region.",
    (MAPS,),
    "Nothing of it is on the held-out list.",
    18_500,
)
FOLDER = "usr/share/kgeography/"
WORDS = {  # language -> colour -> word, in the form that the wordings need
    "en": {name: name for name in COLOURS},
    "zh": dict(zip(COLOURS, ("红色", "橙色", "黄色", "绿色", "青色", "蓝色", "紫色"), strict=True)),
    "de": dict(zip(COLOURS, ("rot", "orange", "gelb", "grün", "türkis", "blau", "lila"), strict=True)),
    "ru": dict(zip(COLOURS, ("красным", "оранжевым", "жёлтым", "зелёным", "голубым", "синим", "фиолетовым"), strict=True)),
    "es": dict(zip(COLOURS, ("rojo", "naranja", "amarillo", "verde", "cian", "azul", "morado"), strict=True)),
}
WHICH = {
    "en": (
        "Map of {map}: which region is {colour}?",
        "Which part of {map} is coloured {colour}?",
        "{map}: name the {colour} region.",
    ),
    "zh": ("{map}地图：{colour}的是哪个地区？", "{map}的哪一部分是{colour}？"),
    "de": ("Karte von {map}: Welches Gebiet ist {colour}?", "Welcher Teil von {map} ist {colour} gefärbt?"),
    "ru": ("Карта «{map}»: какой регион закрашен {colour}?", "«{map}»: какая часть выделена {colour}?"),
    "es": ("Mapa de {map}: ¿qué región está en {colour}?", "¿Qué parte de {map} está en {colour}?"),
}
CAPITAL = ("Map of {map}: what is the capital of the {colour} region?", "{map}: name the capital of the {colour} part.")
COLOUR = ("Map of {map}: which colour does {name} have?", "What colour is {name} on this map of {map}?")
BOX = ("Locate <|object_ref_start|>{name}<|object_ref_end|> on the map of {map}.", "{map}: give the box of {name}.")
LANGUAGES = tuple(WORDS)
PICTURES = 3  # for each region of a map that is large enough
SMALLEST_REGION = 30  # pixels that a region needs in the picture
MAX_MAP_PIXELS = 4_000_000
LAND, BORDER, REST = (226, 224, 216), (90, 90, 90), (250, 250, 250)


@dataclass(frozen=True, eq=False)
class Map:
    """A map and its regions as pixels."""

    name: str
    regions: tuple[tuple[str, str | None], ...]  # name, capital
    labels: np.ndarray  # uint16 [height, width]: 1 + number of the region, 0 elsewhere
    borders: np.ndarray  # bool [height, width]


def make(cache: Path, seed: int, side: int) -> Iterator[Item | LeftOut]:
    """Items and what is left out, as `items` says. Raises UserError for a package that cannot be had or a broken map."""
    files = dict(members(MAPS, lambda name: name.startswith(FOLDER) and name.count("/") == 3, cache))
    rng = np.random.default_rng([seed, 5])
    for path in sorted(name for name in files if name.endswith(".kgm")):
        whole = read_map(path, files)
        length = TOKEN_SIDE * ((side + 1) // TOKEN_SIDE) - 1 if side >= TOKEN_SIDE else side
        large = [*_large_enough(whole, length)]
        small = sorted(set(range(len(whole.regions))) - set(large))
        yield from (LeftOut(f"map:{path}/{whole.regions[i][0]}", "too small to be seen") for i in small)
        for split in ("train", "validation"):
            chosen = [i for i in large if split_of(_content(whole, [i])) == split]
            for _ in range(PICTURES * len(chosen)):
                yield _item(rng, whole, chosen, split, length)


def read_map(path: str, files: Mapping[str, bytes]) -> Map:
    """A .kgm file, XML that gives the colour of every region in a picture. Raises UserError for one that is broken."""
    try:
        if b"<!ENTITY" in files[path]:
            raise ValueError("declares entities")
        root = ElementTree.fromstring(files[path])
        image = Image.open(io.BytesIO(files[FOLDER + root.findtext("mapFile", "")]), formats=("PNG",))
        if image.width * image.height > MAX_MAP_PIXELS:
            raise ValueError(f"its picture is {image.width} x {image.height}")
        pixels = np.asarray(image.convert("RGB")).astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
        divisions = [(d, sum(int(d.findtext(f"color/{c}")) << s for c, s in zip(("red", "green", "blue"), (16, 8, 0)))) for d in
                     root.findall("division")]  # fmt: skip
    except (KeyError, TypeError, ValueError, ElementTree.ParseError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a map ({error}).") from error
    ignored = [colour for d, colour in divisions if d.findtext("ignore") not in (None, "no")]
    named = [(d, colour) for d, colour in divisions if d.findtext("ignore") in (None, "no") and d.findtext("name")]
    table = {colour: number for number, (_, colour) in enumerate(named, start=1)}
    found, places = np.unique(pixels, return_inverse=True)
    labels = np.array([table.get(int(colour), 0) for colour in found], np.uint16)[places].reshape(pixels.shape)
    dark = [colour for colour in ignored if colour in (0, 0x010101)]
    regions = tuple((d.findtext("name").strip(), (d.findtext("capital") or "").strip() or None) for d, _ in named)
    return Map(root.findtext("name", "").strip(), regions, labels, np.isin(pixels, dark))


def _large_enough(whole: Map, length: int) -> Iterator[int]:
    """Regions whose name is theirs alone and that keep SMALLEST_REGION pixels in a picture of this largest side."""
    shrunk = min(1.0, length / max(whole.labels.shape)) ** 2
    sizes = np.bincount(whole.labels.ravel(), minlength=len(whole.regions) + 1)[1:] * shrunk
    names = [name for name, _ in whole.regions]
    yield from (i for i, name in enumerate(names) if sizes[i] >= SMALLEST_REGION and names.count(name) == 1)


def _content(whole: Map, chosen: list[int]) -> str:
    return f"map {whole.name}: " + "; ".join(sorted(whole.regions[i][0] for i in chosen))


def _item(rng: np.random.Generator, whole: Map, regions: list[int], split: str, length: int) -> Item:
    """One to four regions in colours of their own, and up to three questions; the other regions are all of one colour."""
    count = min(len(regions), int(rng.integers(1, 5)))
    chosen = [regions[i] for i in rng.permutation(len(regions))[:count].tolist()]
    colours = [tuple(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:count].tolist()]
    palette = np.array([REST, *[LAND] * len(whole.regions)], np.uint8)
    for i, colour in zip(chosen, colours, strict=True):
        palette[i + 1] = jittered(rng, COLOURS[colour])
    painted = palette[whole.labels]
    painted[whole.borders] = BORDER
    image = fitted(Image.fromarray(painted), length, length)
    turns: list[Turn] = []
    for i, colour in zip(chosen, colours, strict=True):
        name, capital = whole.regions[i]
        language = pick(rng, LANGUAGES)
        turns.append(Turn("map_region", pick(rng, WHICH[language]).format(map=whole.name, colour=WORDS[language][colour]), name))
        turns.append(Turn("map_colour", pick(rng, COLOUR).format(map=whole.name, name=name), colour))
        if capital is not None:
            turns.append(Turn("map_capital", pick(rng, CAPITAL).format(map=whole.name, colour=colour), capital))
    i = pick(rng, chosen)
    box = box_text(_box(whole.labels == i + 1), whole.labels.shape[1], whole.labels.shape[0])
    turns.append(Turn("map_box", pick(rng, BOX).format(map=whole.name, name=whole.regions[i][0]), box))
    asked = tuple(turns[i] for i in rng.permutation(len(turns))[:3].tolist())
    keys = tuple(f"map:{whole.name}/{whole.regions[i][0]}" for i in chosen)
    return Item(png(image), asked, _content(whole, chosen), split, keys)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    down, across = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1
