"""Flags of countries and territories: their names in five languages, capitals in English, which flag is where."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageStat

from andesvl_jax.data.examples import Turn, pick
from andesvl_jax.prepare import held_out
from andesvl_jax.prepare.drawings import rasterize
from andesvl_jax.prepare.items import Card, Item, LeftOut, split_of
from andesvl_jax.prepare.packages import Package, members, read
from andesvl_jax.prepare.scenes import LANGUAGES, Thing, counting_item, drawer, naming_item, placing_item

FLAGS = Package(
    "npm", "flag-icons", "7.5.0", 1_119_924, "c0b80bf0e08006a60f56621d6bc49f8c7131f4d1fef6737a165a673431f4b518", "MIT"
)
NAMES = Package(
    "npm", "cldr-localenames-full", "48.2.0", 1_958_951, "7f2ac7fd3b5d90f56ad127f9ed5ae67b58b3e556818f55530b9f47bb81bcde57",
    "Unicode-3.0",
)  # fmt: skip
CARD = Card(
    "flags",
    "Flags alone and in scenes: the country in five languages, its capital in English, which flag is where.",
    (FLAGS, NAMES),
    "Countries whose emoji is held out are left out.",
    15_200,
)
NAMING = {
    "en": ("Whose flag is this?", "Which country or territory has this flag?", "Name the country of this flag."),
    "zh": ("这是哪里的旗帜？", "这面旗帜属于哪个国家或地区？", "请说出这面旗帜所属的国家或地区。"),
    "de": ("Wessen Flagge ist das?", "Zu welchem Land oder Gebiet gehört diese Flagge?", "Nenne das Land dieser Flagge."),
    "ru": ("Чей это флаг?", "Какой стране или территории принадлежит этот флаг?", "Назови страну этого флага."),
    "es": ("¿De quién es esta bandera?", "¿Qué país o territorio tiene esta bandera?", "Nombra el país de esta bandera."),
}
CAPITAL = ("What is the capital of the country with this flag?", "Name the capital of the place that has this flag.")
DRAWN = 128  # pixels of the large drawing
LOOKS = 4  # pictures of a flag for each language
SCENES = 2000  # of each kind
ALIKE = 12.0  # mean difference of 8-bit colours below which two flags are too alike
MAX_FLAG_BYTES = 1 << 20
FIRST = ("fr", "nl", "no", "us", "gb", "au")  # states whose flags some of their territories use
REGIONAL_A = 0x1F1E6  # the regional indicator of the letter A
SHAPES = {"4x3": (4, 3), "1x1": (1, 1)}
Drawn = Mapping[str, str]  # shape -> SVG


def make(cache: Path, seed: int, side: int) -> Iterator[Item | LeftOut]:
    """Items and what is left out, as `items` says. Raises UserError for packages that cannot be had."""
    countries = [entry for entry in json.loads(read(FLAGS, ("country.json",), cache)["country.json"]) if entry.get("iso")]
    things, capitals = [], {}
    names = territory_names(cache)
    svgs = _drawings(cache, {entry["code"] for entry in countries})
    for entry, reason in chosen(countries, names, svgs):
        key = f"country:{entry['code']}"
        if reason is not None:
            yield LeftOut(key, reason)
            continue
        things.append({shape: _thing(entry["code"], names, svgs[entry["code"]][shape], shape) for shape in SHAPES})
        capitals[key] = entry.get("capital")
    yield from _items(np.random.default_rng([seed, 3]), things, capitals, side)


def _items(rng: np.random.Generator, things: list[dict[str, Thing]], capitals: Mapping[str, str | None], side: int):
    for shapes in things:
        for language in LANGUAGES:
            for _ in range(LOOKS):
                thing = shapes["4x3" if rng.random() < 0.7 else "1x1"]
                turns = [Turn("flag_name", pick(rng, NAMING[language]), thing.names[language])]
                if language == "en" and capitals[thing.key]:
                    turns.append(Turn("flag_capital", pick(rng, CAPITAL), capitals[thing.key]))
                yield _keyed(naming_item(rng, thing, turns, thing.key, language, side))
    known = [shapes["4x3"] for shapes in things if split_of(shapes["4x3"].key) == "train"]
    for _ in range(SCENES):
        yield _keyed(counting_item(rng, known, pick(rng, LANGUAGES), side, "flag_count"))
        yield _keyed(placing_item(rng, known, pick(rng, LANGUAGES), side, "flag_place"))


def _keyed(item: Item) -> Item:
    """The item with the emoji of its countries among the keys, so that the held-out list holds for them."""
    emoji = [f"emoji:{emoji_of(key.partition(':')[2])}" for key in item.keys if key.startswith("country:")]
    return Item(item.picture, item.turns, item.content, item.split, (*item.keys, *emoji))


def emoji_of(code: str) -> str:
    """Code points of the flag emoji of a two-letter country code."""
    return "-".join(f"{REGIONAL_A + ord(letter) - ord('a'):x}" for letter in code.lower())


def territory_names(cache: Path) -> dict[str, dict[str, str]]:
    """Language -> two-letter code in lower case -> name."""
    paths = {language: f"main/{language}/territories.json" for language in LANGUAGES}
    files = read(NAMES, paths.values(), cache)
    return {
        language: {
            code.lower(): name
            for code, name in json.loads(files[path])["main"][language]["localeDisplayNames"]["territories"].items()
        }
        for language, path in paths.items()
    }


def _drawings(cache: Path, codes: set[str]) -> dict[str, Drawn]:
    """Code -> the drawings of a country."""
    paths = {f"flags/{shape}/{code}.svg": (code, shape) for code in codes for shape in SHAPES}
    found: dict[str, dict[str, str]] = {code: {} for code in codes}
    for path, data in members(FLAGS, paths.__contains__, cache):
        code, shape = paths[path]
        found[code][shape] = data[:MAX_FLAG_BYTES].decode()
    return found


def chosen(
    countries: list[dict], names: Mapping[str, Mapping[str, str]], svgs: Mapping[str, Drawn]
) -> Iterator[tuple[dict, str | None]]:  # fmt: skip
    """(country, reason to leave it out or None); of flags that look alike one stays, none of them if one is held out."""
    last = len(FIRST)
    order = sorted(countries, key=lambda entry: FIRST.index(entry["code"]) if entry["code"] in FIRST else last)
    held = [entry for entry in order if held_out.emoji(emoji_of(entry["code"]))]
    seen = {
        "with the flag of one that is held out": [_small(svgs, entry["code"]) for entry in held],
        "with the flag of another": [],
    }
    yield from ((entry, "whose emoji is held out") for entry in held)
    for entry in order:
        code = entry["code"]
        if entry in held:
            continue
        if not all(code in names[language] for language in LANGUAGES):
            yield entry, "without a name in every language"
            continue
        drawn = _small(svgs, code)
        alike = [reason for reason, others in seen.items() if any(_difference(other, drawn) < ALIKE for other in others)]
        seen["with the flag of another"].append(drawn)
        yield entry, alike[0] if alike else None


def _small(svgs: Mapping[str, Drawn], code: str) -> Image.Image:
    return rasterize(svgs[code]["4x3"], 40, 30, f"flag {code}").convert("RGB")


def _difference(a: Image.Image, b: Image.Image) -> float:
    return sum(ImageStat.Stat(ImageChops.difference(a, b)).mean) / 3


def _thing(code: str, names: Mapping[str, Mapping[str, str]], svg: str, shape: str) -> Thing:
    across, down = SHAPES[shape]

    def large() -> Image.Image:
        image = rasterize(svg, DRAWN, DRAWN * down // across, f"flag {code}")
        ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline=(150, 150, 150, 255))
        return image

    return Thing(f"country:{code}", {language: names[language][code] for language in LANGUAGES}, drawer(large))
