"""Tux Paint's stamps, cut-outs of animals, food and many other things, with captions in five languages, on made backgrounds."""

import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from andesvl_jax.data.examples import Turn, pick
from andesvl_jax.errors import UserError
from andesvl_jax.prepare import held_out
from andesvl_jax.prepare.drawings import fitted, rasterize, trimmed
from andesvl_jax.prepare.items import Card, Item, LeftOut, split_of
from andesvl_jax.prepare.packages import Package, members
from andesvl_jax.prepare.scenes import CELLS, LANGUAGES, Thing, counting_item, naming_item, placing_item

STAMPS = Package(
    "deb", "tuxpaint-stamps-default", "2022.06.04-1", 160_880_444,
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34", "GPL-2",
)  # fmt: skip
CARD = Card(
    "stamps",
    "Cut-outs of animals, food, vehicles and more on made backgrounds: captions in five languages, counting, places, kinds.",
    (STAMPS,),
    "One English caption in five is held out with its pictures and translations, and so are the languages ja and ar.",
    27_800,
)
FOLDER = "usr/share/tuxpaint/stamps/"
TAGS = {"zh": "zh_CN", "de": "de", "ru": "ru", "es": "es"}  # in the caption files; English is their first line
CAPTIONING = {
    "en": ("What is shown here?", "Describe this picture.", "What do you see?", "Write a caption."),
    "zh": ("图中是什么？", "请描述这张图片。", "你看到了什么？", "请写一句说明。"),
    "de": ("Was ist hier zu sehen?", "Beschreibe dieses Bild.", "Was siehst du?", "Schreibe eine Bildunterschrift."),
    "ru": ("Что здесь изображено?", "Опиши эту картинку.", "Что ты видишь?", "Напиши подпись."),
    "es": ("¿Qué se muestra aquí?", "Describe esta imagen.", "¿Qué ves?", "Escribe un pie de foto."),
}
KIND_QUESTIONS = ("What kind of thing is it?", "Which kind of thing is shown?", "To which category does it belong?")
KINDS = {  # folder -> answer, of those that are plain
    "animals": "animal", "clothes": "clothes", "food": "food", "household": "household", "people": "people", "plants": "plant",
    "seasonal": "seasonal", "space": "space", "sports": "sports", "vehicles": "vehicle", "town": "town", "hobbies": "hobby",
}  # fmt: skip
KIND_CHOICE = " Choose from: " + ", ".join(sorted(KINDS.values())) + "."
DRAWN = 176  # pixels, the largest side that is kept
MAX_STAMP_PIXELS = 16_000_000
LONGEST_CAPTION, LONGEST_NAME = 100, 32  # characters
LOOKS = 3  # pictures of a stamp for each language
SCENES = 3000  # of each kind


def make(cache: Path, seed: int, side: int) -> Iterator[Item | LeftOut]:
    """Items and what is left out, as `items` says. Raises UserError for a package that cannot be had."""
    captions = {name: parse_captions(data) for name, data in members(STAMPS, _is_caption, cache)}
    kept, left_out = usable(captions)
    yield from (LeftOut(f"text:{name}", reason) for name, reason in left_out.items())
    rng = np.random.default_rng([seed, 4])
    drawn = [*_things(kept, captions, cache)]
    yield from (LeftOut(f"text:{name}", "that cannot be drawn") for name, thing in drawn if thing is None)
    things = [(name, thing) for name, thing in drawn if thing is not None]
    for name, thing in things:
        content = f"stamp {_plain(kept[name]['en'])}"
        for language in thing.names:
            for _ in range(LOOKS):
                turns = [Turn("stamp_caption", pick(rng, CAPTIONING[language]), thing.names[language])]
                kind = KINDS.get(PurePosixPath(name.removeprefix(FOLDER)).parts[0])
                if language == "en" and kind is not None:
                    turns.append(Turn("stamp_kind", pick(rng, KIND_QUESTIONS) + KIND_CHOICE, kind))
                yield naming_item(rng, thing, turns, content, language, side)
    known = [_named(thing) for name, thing in things if split_of(f"stamp {_plain(kept[name]['en'])}") == "train"]
    known = [*{thing.key: thing for thing in known if thing is not None}.values()]
    choices = {x: [*{thing.names[x]: thing for thing in known if x in thing.names}.values()] for x in LANGUAGES}
    spoken = [language for language, named in choices.items() if len(named) >= CELLS * CELLS]
    for _ in range(SCENES):
        for scene, task in ((counting_item, "stamp_count"), (placing_item, "stamp_place")):
            language = pick(rng, spoken)
            yield scene(rng, choices[language], language, side, task)


def _is_caption(name: str) -> bool:
    return name.startswith(FOLDER) and name.endswith(".txt")


def parse_captions(data: bytes) -> dict[str, str]:
    """Language -> caption of a caption file: English in the first line, then lines such as `de.utf8=Ein Frosch.`"""
    first, *lines = data.decode("utf-8", "replace").splitlines() or [""]
    tagged = {tag: text.strip() for tag, found, text in (line.partition(".utf8=") for line in lines) if found}
    captions = {"en": first.strip()} | {language: tagged[tag] for language, tag in TAGS.items() if tag in tagged}
    return {language: text for language, text in captions.items() if text and "\ufffd" not in text}


def usable(captions: Mapping[str, Mapping[str, str]]) -> tuple[dict[str, Mapping[str, str]], dict[str, str]]:
    """Caption files that training may see with their captions, and the others with the reason.

    Besides those on the list: captions that equal one of theirs, in any language, but for case and punctuation.
    """
    held = [found for found in captions.values() if held_out.caption(found.get("en", ""))]
    taken = {(language, _plain(text)) for found in held for language, text in found.items()}
    kept, left_out = {}, {}
    for name, found in captions.items():
        if "en" not in found:
            left_out[name] = "without an English caption"
        elif held_out.caption(found["en"]):
            left_out[name] = "held out"
        elif any((language, _plain(text)) in taken for language, text in found.items()):
            left_out[name] = "captioned like one that is held out"
        elif short := {language: text for language, text in found.items() if len(text) <= LONGEST_CAPTION}:
            kept[name] = short | {"en": found["en"]}
    return kept, left_out


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def _things(
    kept: Mapping[str, Mapping[str, str]], captions: Mapping[str, Mapping[str, str]], cache: Path
) -> Iterator[tuple[str, Thing | None]]:  # fmt: skip
    """(caption file, stamp) of the kept captions that have a picture: PNG rather than SVG, none that a held-out caption has; None
    for a picture that cannot be drawn."""
    wanted = {name.removesuffix("txt") + ending: name for name in captions for ending in ("png", "svg")}
    held, pictures = set(), {}
    for path, data in members(STAMPS, wanted.__contains__, cache):
        name, digest = wanted[path], hashlib.sha256(data).digest()
        if name not in kept:
            held.add(digest)
        elif name not in pictures or path.endswith(".png"):
            pictures[name] = path, data, digest
    for name, (path, data, digest) in sorted(pictures.items()):
        if digest in held:
            continue
        try:
            image = _drawn(path, data)
        except UserError:
            yield name, None
            continue
        draw = lambda side, image=image: fitted(image, side, side)  # noqa: E731
        yield name, Thing(f"caption:{captions[name]['en'].strip().lower()}", kept[name], draw)


def _drawn(path: str, data: bytes) -> Image.Image:
    """RGBA of at most DRAWN pixels a side. Raises UserError for a picture that is broken or too large."""
    if path.endswith(".svg"):
        return trimmed(rasterize(data.decode("utf-8", "replace"), DRAWN, DRAWN, path))
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        if image.width * image.height > MAX_STAMP_PIXELS:
            raise OSError(f"{image.width} x {image.height} pixels")
        return fitted(trimmed(image.convert("RGBA")), DRAWN, DRAWN)
    except OSError as error:  # UnidentifiedImageError is one
        raise UserError(f"{path}: cannot be opened ({error}).") from error


def _named(thing: Thing) -> Thing | None:
    """The stamp with short captions as names for scenes; None where the English one is a sentence."""
    names = {language: text.rstrip(".。!！") for language, text in thing.names.items() if len(text) <= LONGEST_NAME}
    return Thing(thing.key, names, thing.draw) if "en" in names and "." not in names["en"] else None
