"""Noto's emoji under their CLDR names: naming in five languages, counting, and which is where."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from andesvl_jax.data.examples import Turn, pick
from andesvl_jax.prepare import held_out
from andesvl_jax.prepare.drawings import rasterize, svg_of
from andesvl_jax.prepare.items import Card, Item, LeftOut, split_of
from andesvl_jax.prepare.packages import Package, read
from andesvl_jax.prepare.scenes import LANGUAGES, Thing, counting_item, drawer, naming_item, placing_item

NOTO = Package(
    "npm",
    "@iconify-json/noto",
    "1.2.9",
    3_102_958,
    "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    "Apache-2.0",
)
NAMES = Package(
    "npm", "cldr-annotations-full", "48.2.0", 6_537_823, "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    "Unicode-3.0",
)  # fmt: skip
CARD = Card(
    "emoji",
    "Noto emoji alone and in scenes: their names in five languages, how many there are, which is where.",
    (NOTO, NAMES),
    "One emoji in five is held out, with its variants, and so are all skin tones and the languages ja and ar.",
    44_000,
)
NAMING = {
    "en": ("What is this?", "Which emoji is this?", "Name this emoji.", "What does the emoji show?"),
    "zh": ("这是什么？", "这是哪个表情符号？", "请说出这个表情符号的名称。", "这个图案表示什么？"),
    "de": ("Was ist das?", "Welches Emoji ist das?", "Nenne dieses Emoji.", "Was zeigt das Emoji?"),
    "ru": ("Что это?", "Какой это эмодзи?", "Назови этот эмодзи.", "Что изображает этот эмодзи?"),
    "es": ("¿Qué es esto?", "¿Qué emoji es este?", "Nombra este emoji.", "¿Qué representa el emoji?"),
}
DRAWN = 112  # pixels of the large drawing
LOOKS = 2  # pictures of an emoji for each language
SCENES = 6000  # of each kind
IGNORED = {"fe0f", "200d", "2640", "2642", "27a1"}  # variation selector, joiner, gender signs, arrow: variants of one emoji
PERSON = re.compile(r"^(1f468|1f469|1f9d1)$")  # man, woman, person


def make(cache: Path, seed: int, side: int) -> Iterator[Item | LeftOut]:
    """Items and what is left out, as `items` says. Raises UserError for packages that cannot be had."""
    files = {name: json.loads(data) for name, data in read(NOTO, ("chars.json", "icons.json"), cache).items()}
    things, left_out = usable(files["chars.json"], files["icons.json"]["icons"], cldr_names(cache))
    yield from left_out
    rng = np.random.default_rng([seed, 1])
    for thing in things:
        for language in LANGUAGES:
            for _ in range(LOOKS):
                turn = Turn("emoji_name", pick(rng, NAMING[language]), thing.names[language])
                yield naming_item(rng, thing, [turn], thing.key, language, side)
    known = [thing for thing in things if split_of(thing.key) == "train"]
    for _ in range(SCENES):
        yield counting_item(rng, known, pick(rng, LANGUAGES), side, "emoji_count")
        yield placing_item(rng, known, pick(rng, LANGUAGES), side, "emoji_place")


def cldr_names(cache: Path) -> dict[str, dict[str, str]]:
    """Language -> emoji without variation selectors -> its name (CLDR's text-to-speech name)."""
    paths = {language: f"annotations/{language}/annotations.json" for language in LANGUAGES}
    files = read(NAMES, paths.values(), cache)
    parsed = {language: json.loads(files[path])["annotations"]["annotations"] for language, path in paths.items()}
    return {
        language: {text: entry["tts"][0] for text, entry in entries.items() if entry.get("tts")}
        for language, entries in parsed.items()
    }


def usable(
    chars: Mapping[str, str], icons: Mapping[str, Mapping[str, Any]], names: Mapping[str, Mapping[str, str]]
) -> tuple[list[Thing], list[LeftOut]]:
    """The emoji that training may see, and those left out with the reason.

    Besides those on the list: those of one variant family with a held-out one, drawn exactly as it, or of the same name.

    Args:
      chars: code points -> name of the icon. icons: name -> its `body`. names: as `cldr_names` gives.
    """
    held = [code for code in chars if held_out.emoji(code)]
    families = {family(code) for code in held}
    bodies = {icons[chars[code]]["body"] for code in held}
    taken = {(language, called) for code in held for language, called in _names(code, names).items()}
    things, left_out = [], []
    drawn: set[str] = set()
    named: set[tuple[str, str]] = set()
    for code, icon in chars.items():
        called, body = _names(code, names), icons[icon]["body"]
        reason = None
        if held_out.emoji(code):
            reason = "held out"
        elif held_out.skin_tone(code):
            reason = "with a skin tone"
        elif family(code) in families or body in bodies or not taken.isdisjoint(called.items()):
            reason = "like one that is held out"
        elif len(called) < len(LANGUAGES):
            reason = "without a name in every language"
        elif body in drawn:
            reason = "drawn like another"
        elif not named.isdisjoint(called.items()):
            reason = "named like another"
        if reason is not None:
            left_out.append(LeftOut(f"emoji:{code}", reason))
            continue
        drawn.add(body)
        named.update(called.items())
        things.append(Thing(f"emoji:{code}", called, _drawer(icon, body)))
    return things, left_out


def family(code_points: str) -> tuple[str, ...]:
    """What the variants of an emoji have in common: its code points without gender, direction and presentation."""
    parts = [part for part in code_points.split("-") if part not in IGNORED and part not in held_out.SKIN_TONES]
    return tuple(PERSON.sub("person", part) for part in parts)


def _names(code_points: str, names: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    text = "".join(chr(int(part, 16)) for part in code_points.split("-") if part != "fe0f")
    return {language: names[language][text] for language in LANGUAGES if text in names[language]}


def _drawer(icon: str, body: str):
    return drawer(lambda: rasterize(svg_of(body, 128, 128), DRAWN, DRAWN, f"emoji {icon}"))
