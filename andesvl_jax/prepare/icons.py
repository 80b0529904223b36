"""Material Design icons under their English names: naming, and which is where, in light and dark."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from andesvl_jax.data.drawing import jittered
from andesvl_jax.data.examples import Turn, pick
from andesvl_jax.prepare.drawings import rasterize, svg_of
from andesvl_jax.prepare.items import Card, Item, LeftOut, split_of
from andesvl_jax.prepare.packages import Package, read
from andesvl_jax.prepare.scenes import CELLS, Thing, counting_item, drawer, naming_item, placing_item

MDI = Package(
    "npm", "@iconify-json/mdi", "1.2.3", 803_764, "ddd817a7213f91de51147943915c0cda8c8b818a53c92b5c068cfa9883c6d7ac", "Apache-2.0"
)
CARD = Card(
    "icons",
    "Material Design icons, alone and in grids: their English names and places.",
    (MDI,),
    "Nothing of it is on the held-out list.",
    36_200,
)
NAMING = (
    "What is this icon called?",
    "Name this icon.",
    "Which icon is this?",
    "What does the icon show?",
)
DRAWN = 96  # pixels of the large drawing
SCENES = 4000  # of each kind
DARK_INKS = ((20, 20, 24), (70, 74, 84), (20, 70, 170), (150, 30, 40), (20, 110, 60), (110, 40, 140))
LIGHT_INKS = ((250, 250, 250), (210, 216, 226), (140, 196, 255), (255, 206, 90), (150, 230, 170))


def make(cache: Path, seed: int, side: int) -> Iterator[Item | LeftOut]:
    """Items and what is left out, as `items` says. Raises UserError for a package that cannot be had."""
    icons = json.loads(read(MDI, ("icons.json",), cache)["icons.json"])["icons"]
    shown = {name: entry["body"] for name, entry in icons.items() if not entry.get("hidden")}
    yield from (LeftOut(f"icon:{name}", "withdrawn") for name in icons if name not in shown)
    rng = np.random.default_rng([seed, 2])
    things = [_thing(name, body) for name, body in shown.items()]
    for thing in things:
        for light in (False, True):
            turn = Turn("icon_name", pick(rng, NAMING), thing.names["en"])
            yield naming_item(rng, _inked(rng, thing, light), [turn], _family(thing), "en", side, float(light))
    known = [thing for thing in things if split_of(_family(thing)) == "train"]
    for _ in range(SCENES):
        for scene, task in ((counting_item, "icon_count"), (placing_item, "icon_place")):
            light = rng.random() < 0.5
            chosen = rng.choice(len(known), CELLS * CELLS, replace=False).tolist()
            yield scene(rng, _all_inked(rng, [known[i] for i in chosen], light), "en", side, task, float(light))


def _thing(name: str, body: str) -> Thing:
    large = drawer(lambda: rasterize(svg_of(body, 24, 24), DRAWN, DRAWN, f"icon {name}"))
    return Thing(f"icon:{name}", {"en": name.replace("-", " ")}, large)


def _family(thing: Thing) -> str:
    """Content of an icon alone: outlined and filled ones are too alike to be in different splits."""
    return thing.key.removesuffix("-outline")


def _inked(rng: np.random.Generator, thing: Thing, light: bool) -> Thing:
    return _all_inked(rng, [thing], light)[0]


def _all_inked(rng: np.random.Generator, things: list[Thing], light: bool) -> list[Thing]:
    """The things in one random ink that stands out on a dark (`light`) or pale background."""
    ink = jittered(rng, pick(rng, LIGHT_INKS if light else DARK_INKS), 5)

    def inked(thing: Thing) -> Thing:
        return Thing(thing.key, thing.names, lambda side: _tinted(thing.draw(side), ink))

    return [inked(thing) for thing in things]


def _tinted(drawing: Image.Image, ink: tuple[int, int, int]) -> Image.Image:
    tinted = Image.new("RGBA", drawing.size, (*ink, 255))
    tinted.putalpha(drawing.getchannel("A"))
    return tinted
