"""The sources of real pictures on small made-up packages: what is left out, sound answers, splits; the real ones on request."""

import hashlib
import io
import json
import re
import sys
import tarfile
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from archives import archive
from PIL import Image

import andesvl_jax as avl
from andesvl_jax.data.sources import open_source
from andesvl_jax.prepare import emoji, flags, held_out, icons, maps, real, stamps
from andesvl_jax.prepare.drawings import fitted, rasterize, svg_of, trimmed
from andesvl_jax.prepare.items import LeftOut, png
from andesvl_jax.prepare.packages import read
from andesvl_jax.prepare.scenes import LANGUAGES, PLACES, Thing, counting_item, naming_item, picture_sides, placing_item

BOX = re.compile(r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>")
CODES = [f"{i:x}" for i in range(0x1F600, 0x1F640)]


def square(colour) -> str:
    return f'<path fill="#{colour:06x}" d="M8 8h112v112h-112z"/>'


def emoji_files() -> dict[str, bytes]:
    """64 emoji, one more with a tone, one without names, one drawn as a held-out one, one variant of a held-out one."""
    chars = {code: f"face-{code}" for code in CODES}
    bodies = {f"face-{code}": {"body": square(int(code, 16) * 77 % (1 << 24))} for code in CODES}
    held = next(code for code in CODES if held_out.emoji(code))
    more = {f"{CODES[1]}-1f3fb": "toned", "1f9ff": "nameless", "1f9aa": "copy", f"{held}-200d-2642-fe0f": "variant"}
    chars |= {code: icon for code, icon in more.items()}
    bodies |= {icon: {"body": square(number)} for number, icon in enumerate(more.values())}
    bodies["copy"] = bodies[f"face-{held}"]
    return {"chars.json": json.dumps(chars).encode(), "icons.json": json.dumps({"icons": bodies}).encode()}


def name_files() -> dict[str, bytes]:
    files = {}
    for language in (*LANGUAGES, *held_out.LANGUAGES):
        texts = [chr(int(code, 16)) for code in (*CODES, "1f9aa")]
        held = [code for code in CODES if held_out.emoji(code)][1]
        texts.append(chr(int(held, 16)) + "\u200d\u2642")
        entries = {text: {"tts": [f"{language} {text.encode().hex()}"]} for text in texts}
        files[f"annotations/{language}/annotations.json"] = json.dumps({"annotations": {"annotations": entries}}).encode()
    return files


def packed(package, files, cache):
    """The package with other content, which lies in the cache."""
    data = archive(package.kind, files)
    package = replace(package, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    (cache / package.file_name).write_bytes(data)
    return package


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Sets the packages of a source to small ones and its numbers of pictures to few; returns a function that makes it."""

    def prepare(module, files, **numbers):
        for name, content in files.items():
            monkeypatch.setattr(module, name, packed(getattr(module, name), content, tmp_path))
        for name, number in numbers.items():
            monkeypatch.setattr(module, name, number)
        made = list(module.make(tmp_path, 3, 111))
        again = list(module.make(tmp_path, 3, 111))
        assert made == again, "equal arguments give equal items"
        return [m for m in made if not isinstance(m, LeftOut)], [m for m in made if isinstance(m, LeftOut)]

    return prepare


def check(items):
    """What holds of every source: sizes, keys that training may see, contents and pictures in one split."""
    splits = defaultdict(set)
    for item in items:
        image = Image.open(io.BytesIO(item.picture))
        assert max(image.size) <= 111 and item.turns and image.mode == "RGB"
        assert not any(map(held_out.is_held_out, item.keys)), item.keys
        splits[item.content].add(item.split)
        splits[item.picture].add(item.split)
        for turn in item.turns:
            assert turn.question and turn.answer and "{" not in turn.question
            if box := BOX.fullmatch(turn.answer):
                x1, y1, x2, y2 = map(int, box.groups())
                assert 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000
    assert all(len(found) == 1 for found in splits.values())
    assert {item.split for item in items} == {"train", "validation"}


def test_emoji(small):
    pytest.importorskip("resvg_py")
    items, left_out = small(emoji, {"NOTO": emoji_files(), "NAMES": name_files()}, SCENES=60, LOOKS=1)
    check(items)
    reasons = defaultdict(set)
    for left in left_out:
        reasons[left.reason].add(left.key.removeprefix("emoji:"))
    chars = json.loads(emoji_files()["chars.json"])
    assert reasons["held out"] == {code for code in chars if held_out.emoji(code)} and len(reasons["held out"]) > 5
    tone = f"{CODES[1]}-1f3fb"
    assert held_out.emoji(tone) or reasons["with a skin tone"] == {tone}
    shown = {key.removeprefix("emoji:") for item in items for key in item.keys if key.startswith("emoji:")}
    assert shown == set(chars) - set().union(*reasons.values())
    assert {key for item in items for key in item.keys if key.startswith("language:")} == {f"language:{x}" for x in LANGUAGES}
    alone = {item.content for item in items if item.turns[0].task == "emoji_name" and item.split == "validation"}
    together = {key for item in items if item.turns[0].task != "emoji_name" for key in item.keys}
    assert alone and not alone & together, "an emoji that validation names is in no scene"


def test_an_emoji_like_a_held_out_one_is_left_out():
    files = {name: json.loads(data) for name, data in emoji_files().items()}
    names = {language: {chr(int(code, 16)): f"{language} {code}" for code in (*CODES, "1f9aa")} for language in LANGUAGES}
    bodies = files["icons.json"]["icons"]
    reasons = {left.key: left.reason for left in emoji.usable(files["chars.json"], bodies, names)[1]}
    assert reasons["emoji:1f9aa"] in ("held out", "like one that is held out"), "the same drawing"
    variant = next(code for code, icon in files["chars.json"].items() if icon == "variant")
    assert reasons[f"emoji:{variant}"] in ("held out", "like one that is held out"), "a variant"
    assert reasons["emoji:1f9ff"] in ("held out", "without a name in every language")
    held, free = next(c for c in CODES if held_out.emoji(c)), next(c for c in CODES if not held_out.emoji(c))
    names["de"][chr(int(free, 16))] = names["de"][chr(int(held, 16))]
    reasons = {left.key: left.reason for left in emoji.usable(files["chars.json"], bodies, names)[1]}
    assert reasons[f"emoji:{free}"] == "like one that is held out", "the same name"


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("1f468-200d-1f3a8", "1f9d1-200d-1f3a8", True),
        ("1f3c3-200d-2640-fe0f", "1f3c3", True),
        ("1f44b-1f3fb", "1f44b", True),
        ("1f3c3", "1f6b6", False),
        ("1f468-200d-1f3a8", "1f468-200d-1f680", False),
    ],
)
def test_families_of_emoji(one, other, same):
    assert (emoji.family(one) == emoji.family(other)) is same


def test_icons(small):
    pytest.importorskip("resvg_py")
    bodies = {f"thing-{i}": {"body": f'<path fill="currentColor" d="M{i % 9} 4h12v{3 + i}h-12z"/>'} for i in range(60)}
    files = {"icons.json": json.dumps({"icons": bodies | {"gone": {"body": "", "hidden": True}}}).encode()}
    items, left_out = small(icons, {"MDI": files}, SCENES=40)
    check(items)
    assert [left.key for left in left_out] == ["icon:gone"]


def test_flags(small):
    pytest.importorskip("resvg_py")
    codes = [a + b for a in "abcd" for b in "efghijkl"]
    rng = np.random.default_rng(0)
    colour = {code: rng.integers(0, 256, (6, 3)).tolist() for code in codes}
    held = next(code for code in codes if held_out.emoji(flags.emoji_of(code)))
    free = [code for code in codes if not held_out.emoji(flags.emoji_of(code))]
    colour[free[0]] = colour[held]
    colour[free[2]] = colour[free[1]]

    def svg(code):
        stripes = [f'<path fill="rgb({r},{g},{b})" d="M0 {10 * i}h80v10H0z"/>' for i, (r, g, b) in enumerate(colour[code])]
        return f'<svg xmlns="http://www.w3.org/2000/svg" id="flag-{code}" viewBox="0 0 80 60">{"".join(stripes)}</svg>'.encode()

    countries = [{"code": code, "iso": True, "capital": f"Capital {code}"} for code in codes]
    files = {"country.json": json.dumps(countries).encode()}
    files |= {f"flags/{shape}/{code}.svg": svg(code) for code in codes for shape in flags.SHAPES}
    names = {
        f"main/{x}/territories.json": json.dumps(
            {"main": {x: {"localeDisplayNames": {"territories": {code.upper(): f"{x} {code}" for code in codes}}}}}
        ).encode()
        for x in LANGUAGES
    }
    items, left_out = small(flags, {"FLAGS": files, "NAMES": names}, SCENES=40, LOOKS=1)
    check(items)
    reasons = {left.key.removeprefix("country:"): left.reason for left in left_out}
    for code in codes:
        assert (reasons.get(code) == "whose emoji is held out") == held_out.emoji(flags.emoji_of(code))
    assert reasons[free[0]] == "with the flag of one that is held out" and reasons[free[2]] == "with the flag of another"
    assert flags.emoji_of("de") == "1f1e9-1f1ea"


def stamp_files(count=60):
    files, rng = {}, np.random.default_rng(1)
    for i in range(count):
        lines = [f"A thing {i}.", f"zh_CN.utf8=东西{i}。", f"de.utf8=Ein Ding {i}.", f"ja.utf8=もの{i}。", "fr.utf8=chose"]
        files[f"{stamps.FOLDER}animals/s{i}.txt"] = "\n".join(lines).encode()
        pixels = rng.integers(0, 256, (20, 30, 4), np.uint8)
        pixels[..., 3] = 255
        pixels[:, :4] = 0
        files[f"{stamps.FOLDER}animals/s{i}.png"] = png(Image.fromarray(pixels))
        files[f"{stamps.FOLDER}animals/s{i}_mirror.png"] = b"has no caption of its own"
    return files


def test_stamps(small):
    files = stamp_files()
    held = [i for i in range(60) if held_out.caption(f"A thing {i}.")]
    free = [i for i in range(60) if i not in held]
    path = f"{stamps.FOLDER}animals/s{{}}."
    files[path.format(free[0]) + "png"] = files[path.format(held[0]) + "png"]
    files[path.format(free[1]) + "txt"] = f"A second thing.\nde.utf8=EIN DING, {held[0]}!".encode()
    assert not held_out.caption("A second thing.")
    items, left_out = small(stamps, {"STAMPS": files}, SCENES=40, LOOKS=1)
    check(items)
    reasons = {left.key.rpartition("/s")[2].removesuffix(".txt"): left.reason for left in left_out}
    assert {int(i) for i, reason in reasons.items() if reason == "held out"} == set(held)
    assert reasons[str(free[1])] == "captioned like one that is held out"
    texts = " ".join(text for item in items for turn in item.turns for text in (turn.question, turn.answer))
    for i in (*held, *free[:2]):
        assert not re.search(rf"(thing|东西|Ding) ?{i}\b", texts)
    assert "もの" not in texts and "chose" not in texts and "东西" in texts and "Ding" in texts


def map_files():
    labels = np.arange(36).reshape(6, 6).repeat(15, 0).repeat(18, 1)
    pixels = np.stack([labels, 255 - labels, labels * 0 + 7], -1).astype(np.uint8)
    pixels[::15] = 0
    regions = [("Frontier", (0, 0, 0), True)] + [(f"Region {i}", (i, 255 - i, 7), False) for i in range(36)]
    divisions = "".join(
        f"<division><name>{name}</name>{'<ignore>yes</ignore>' if ignored else f'<capital>Town of {name}</capital>'}"
        f"<color><red>{r}</red><green>{g}</green><blue>{b}</blue></color></division>"
        for name, (r, g, b), ignored in regions
    )
    xml = f"<?xml version='1.0'?><map><mapFile>land.png</mapFile><name>Land</name>{divisions}</map>"
    return {maps.FOLDER + "land.kgm": xml.encode(), maps.FOLDER + "land.png": png(Image.fromarray(pixels))}


def test_maps(small):
    """The answers are found again in the pixels: the asked region's cell has the colour that the question names."""
    items, _ = small(maps, {"MAPS": map_files()}, PICTURES=3)
    check(items)
    asked = 0
    for item in items:
        pixels = np.asarray(Image.open(io.BytesIO(item.picture)).convert("RGB")).astype(int)
        for turn in item.turns:
            if turn.task != "map_colour":
                continue
            number = int(re.search(r"Region (\d+)", turn.question).group(1))
            row, column = divmod(number, 6)
            y, x = ((row + 0.5) / 6 * pixels.shape[0], (column + 0.5) / 6 * pixels.shape[1])
            expected = maps.COLOURS[turn.answer]
            assert np.abs(pixels[int(y), int(x)] - expected).max() < 40
            asked += 1
    assert asked > 20
    named = {turn.answer for item in items if item.split == "train" for turn in item.turns if turn.task == "map_region"}
    held = {turn.answer for item in items if item.split == "validation" for turn in item.turns if turn.task == "map_region"}
    assert named and held and not named & held, "no region of validation is named in training"


@pytest.mark.parametrize(
    "change", [(b"<red>0", b"<red>x"), (b"land.png", b"sea.png"), (b"<map>", b"<map"), (b"<map>", b"<!ENTITY x>")]
)
def test_a_broken_map_is_told_in_a_sentence(change, small):
    files = map_files()
    files[maps.FOLDER + "land.kgm"] = files[maps.FOLDER + "land.kgm"].replace(*change)
    with pytest.raises(avl.UserError, match=r"land.kgm: cannot be read as a map"):
        small(maps, {"MAPS": files})


SOLID = [
    (255, 0, 0), (0, 160, 0), (0, 0, 255), (200, 0, 200), (0, 200, 200), (90, 60, 30), (255, 140, 0), (0, 0, 0), (130, 130, 130),
    (255, 255, 0),
]  # fmt: skip
THINGS = [
    Thing(f"icon:{i}", {x: f"{x}{i}" for x in LANGUAGES}, lambda side, c=c: Image.new("RGBA", (side, side), (*c, 255)))
    for i, c in enumerate(SOLID)
]


def blocks(item) -> dict[int, list[tuple[float, float]]]:
    """Number of the thing -> centres (x, y) of its solid squares, found in the pixels by colour."""
    pixels = np.asarray(Image.open(io.BytesIO(item.picture)).convert("RGB")).astype(int)
    found = {}
    for i, colour in enumerate(SOLID):
        mask = np.abs(pixels - colour).max(-1) < 45
        centres = []
        while mask.sum() > 60:
            y, x = np.argwhere(mask)[0]
            width = 0
            while x + width < mask.shape[1] and mask[y : y + 6, x + width].sum() >= 3:
                width += 1
            centres.append((x + width / 2, y + width / 2))
            mask[max(y - 2, 0) : y + width + 2, max(x - 2, 0) : x + width + 2] = False
        found[i] = [c for c in centres]
    return found


@pytest.mark.parametrize("language", LANGUAGES)
def test_counts_are_those_of_the_picture(language):
    rng = np.random.default_rng(5)
    for _ in range(25):
        item = counting_item(rng, THINGS, language, 139, "count")
        found = blocks(item)
        for turn in item.turns:
            asked = re.search(rf"{language}(\d)\b", turn.question)
            expected = len(found[int(asked.group(1))]) if asked else sum(map(len, found.values()))
            assert int(turn.answer) == expected, turn


@pytest.mark.parametrize("language", LANGUAGES)
def test_places_and_boxes_are_those_of_the_picture(language):
    rng = np.random.default_rng(6)
    opposite = {word: name for name, word in PLACES[language].items()}
    for _ in range(25):
        item = placing_item(rng, THINGS, language, 139, "place")
        centre = {i: places[0] for i, places in blocks(item).items() if places}
        width, height = Image.open(io.BytesIO(item.picture)).size
        for turn in item.turns:
            answer = re.fullmatch(rf"{language}(\d)", turn.answer)
            asked = re.search(rf"{language}(\d)", turn.question)
            if box := BOX.fullmatch(turn.answer):
                x1, y1, x2, y2 = map(int, box.groups())
                x, y = centre[int(asked.group(1))]
                assert x1 < x / width * 1000 < x2 and y1 < y / height * 1000 < y2
            elif answer is None:  # where is it
                name, (x, y) = opposite[turn.answer], centre[int(asked.group(1))]
                assert ("left" not in name or x < width / 2) and ("right" not in name or x > width / 2)
                assert ("top" not in name or y < height / 2) and ("bottom" not in name or y > height / 2)
            elif asked:  # beside
                (x, y), (other_x, other_y) = centre[int(answer.group(1))], centre[int(asked.group(1))]
                assert abs(x - other_x) > 15 or abs(y - other_y) > 15


def test_sides_are_one_less_than_whole_tokens():
    assert picture_sides(139) == [55, 83, 111, 139] and picture_sides(139, 3) == [111, 139] and picture_sides(20) == [20]
    rng = np.random.default_rng(0)
    for side in (139, 223):
        sizes = {Image.open(io.BytesIO(naming_item(rng, THINGS[0], [], "x", "en", side).picture)).size[0] for _ in range(60)}
        assert sizes == set(picture_sides(side))


@pytest.mark.parametrize(
    "inside",
    [
        '<image href="/etc/passwd" width="9" height="9"/>',
        "<image xlink:href='other.png' width='9' height='9'/>",
        '<path fill="url(http://x/y#z)" d="M0 0h9v9z"/>',
        "<style>@import 'x.css';</style>",
    ],
)
def test_drawings_that_refer_to_other_files_are_refused(inside):
    with pytest.raises(avl.UserError, match="thing: refers to other files"):
        rasterize(svg_of(inside, 9, 9), 9, 9, "thing")


def test_drawings_need_resvg(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(avl.UserError, match=r"drawings need the package resvg-py; install `andesvl-jax\[real\]`"):
        rasterize(svg_of("", 9, 9), 9, 9, "thing")


def test_a_drawing_keeps_its_shape_and_inner_references():
    pytest.importorskip("resvg_py")
    body = '<linearGradient id="a"><stop stop-color="red"/></linearGradient><path fill="url(#a)" d="M0 0h8v4H0z"/>'
    image = rasterize(svg_of(body, 8, 8), 32, 32, "thing")
    assert image.size == (32, 32) and image.getpixel((16, 8)) == (255, 0, 0, 255) and image.getpixel((16, 28))[3] == 0
    assert trimmed(image).size == (32, 16) and fitted(trimmed(image), 10, 10).size == (10, 5)
    with pytest.raises(avl.UserError, match="thing: cannot be drawn"):
        rasterize("<svg", 8, 8, "thing")


@pytest.mark.slow
def test_the_real_packages_have_the_held_out_items_that_are_known():
    """Counts worked out when the list was made: they tell of a package or a predicate that changed."""
    chars = json.loads(read(emoji.NOTO, ("chars.json",))["chars.json"])
    assert (len(chars), sum(map(held_out.emoji, chars))) == (3729, 723)
    captions = {name: stamps.parse_captions(data)["en"] for name, data in stamps.members(stamps.STAMPS, stamps._is_caption)}
    pictures = {name for name in _names_of_stamps() if name[:-3] + "txt" in captions}
    english = [captions[name[:-3] + "txt"] for name in pictures]
    assert (len(english), sum(map(held_out.caption, english))) == (1033, 194)
    distinct = {text.lower() for text in english}
    assert (len(distinct), sum(map(held_out.caption, distinct))) == (774, 151)


def _names_of_stamps() -> list[str]:
    return [
        name
        for name, _ in stamps.members(stamps.STAMPS, lambda name: name.startswith(stamps.FOLDER))
        if name.endswith(("png", "svg"))
    ]


@pytest.mark.slow
def test_the_real_sources(tmp_path):
    """Everything, twice interrupted by nothing: counts as the cards say, nothing held out, enough to train on."""
    pytest.importorskip("resvg_py")
    pytest.importorskip("rapidocr")
    whole = real.prepare_real(tmp_path / "real")["sources"]
    for name, module in real.SOURCES.items():
        assert abs(whole[name]["train"]["distinct"] / module.CARD.questions - 1) < 0.05, name
        for split in ("train", "validation"):
            with tarfile.open(tmp_path / "real" / name / f"{split}.tar") as tar:
                for member in tar:
                    if member.name.endswith(".json"):
                        record = json.load(tar.extractfile(member))
                        assert not any(map(held_out.is_held_out, record["keys"]))
            source = open_source(str(tmp_path / "real" / name / f"{split}.tar"))
            assert all(source[i] for i in range(0, len(source), 101))
    assert whole["emoji"]["left_out"]["held out"] == 723
    assert sum(manifest["train"]["distinct"] for manifest in whole.values()) >= 60_000
