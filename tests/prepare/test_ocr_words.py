"""Writing over pictures: it is legible, where it is said to be, in fonts that have it, and in one split."""

import functools
import gzip
import io
import re

import msgpack
import numpy as np
import pytest
from PIL import Image

import andesvl_jax as avl
from andesvl_jax.data.drawing import font_folder
from andesvl_jax.data.examples import in_validation
from andesvl_jax.prepare import ocr_words as ocr
from andesvl_jax.prepare.items import split_of

SANS = str(font_folder() / "DejaVuSans.ttf")
FONTS = {language: [SANS] for language in ocr.ALPHABETS}
WORDS = {"en": ["apple", "tree", "house", "river"], "de": ["größe", "straße"], "ru": ["лодка", "мир"], "zh": ["abc", "def"]}
BOX = re.compile(r"\((\d+),(\d+)\),\((\d+),(\d+)\)")


@functools.cache
def wallpaper(seed: int) -> Image.Image:
    """A coarse, colourful picture."""
    small = np.random.default_rng(seed).integers(0, 256, (12, 20, 3), np.uint8)
    return Image.fromarray(small).resize((800, 480), Image.Resampling.BICUBIC)


def cb(*levels, header=None) -> bytes:
    return gzip.compress(msgpack.packb([header or {"format": "cB", "version": 1}, *levels]))


def test_word_lists_are_read_in_order_and_filtered():
    data = cb([], ["the", "to"], ["it's", "2nd", "größe", "don"])
    assert ocr.parse_words(data, ocr.ALPHABETS["en"]) == ["the", "to", "don"]
    with pytest.raises(avl.UserError, match="another format than cB 1"):
        ocr.parse_words(cb(["a"], header={"format": "cB", "version": 2}), "a")


def test_poems_lose_titles_poets_and_colours():
    head = "\x1b[32m《送别》\x1b[m\n\x1b[33m作者：王维\x1b[m\n"
    text = head + "下马饮君酒，问君何所之。\n君言不得意，归卧南山陲。\n%\n\x1b[32m空\x1b[m\n%\n"
    assert ocr.parse_poems(text) == [("下马饮君酒", "问君何所之", "君言不得意", "归卧南山陲")]


@pytest.mark.parametrize(
    "name, key",
    [
        ("usr/share/backgrounds/mate/abstract/Elephants_3840x2160.jpg", "Elephants"),
        ("usr/share/backgrounds/mate/nature/FreshFlower.jpg", "FreshFlower"),
        ("usr/share/backgrounds/gnome/pixels-d.webp", "pixels"),
        ("usr/share/wallpapers/Flow/contents/images_dark/720x1440.jpg", "Flow"),
    ],
)
def test_a_wallpaper_has_one_key_whatever_its_size_and_shade(name, key):
    assert ocr.wallpaper_key(name) == key


def test_flat_wallpapers_are_told_from_scenes():
    flat = Image.new("RGB", (300, 200), "white")
    flat.paste(wallpaper(0).resize((120, 200)), (0, 0))
    assert ocr.is_flat(flat) and not ocr.is_flat(wallpaper(0))


def test_contrast_is_that_of_wcag():
    white, black, grey = (np.full((4, 4, 3), level, np.uint8) for level in (255, 0, 119))
    assert ocr.legibility(white, (0, 0, 0)) == pytest.approx(21) == ocr.legibility(black, (255, 255, 255))
    assert ocr.legibility(grey, (255, 255, 255)) == pytest.approx(4.48, abs=0.01)
    half = np.concatenate([white, black])
    assert ocr.legibility(half, (255, 255, 255)) == pytest.approx(1)


def test_fonts_without_a_character_are_refused():
    assert ocr.has_glyph(SANS, "ж") and not ocr.has_glyph(SANS, "马")
    with pytest.raises(avl.UserError, match="no glyph for '马'"):
        ocr.text_block(["马"], SANS, 20)


@pytest.mark.parametrize("side", [140, 400])
def test_writing_is_legible_and_inside_its_box(side, monkeypatch):
    """The pictures with and without the ink differ in the boxes alone, up to their edges, and there by enough contrast."""
    grounds = []
    original = ocr.legibility
    monkeypatch.setattr(
        ocr, "legibility", lambda ground, ink: grounds.append((original(ground, ink), ground, ink)) or grounds[-1][0]
    )
    for seed in range(60):
        rng = np.random.default_rng(seed)
        picture = ocr.draw_background(rng, wallpaper(seed % 3), side)
        assert max(picture.size) <= side
        (writing,) = ocr.draw_writings(np.random.default_rng(0), {k: [v[seed % 2]] for k, v in WORDS.items()}, [], FONTS)[:1]
        placed = ocr.place(rng, picture, writing)
        if placed is None:
            continue
        mask, box = placed
        before = np.array(picture)
        assert ocr.write(rng, picture, mask, box) == box
        ratio, ground, ink = grounds[-1]
        assert ratio >= ocr.CONTRAST
        around = (box[0] - ocr.QUIET, box[1] - ocr.QUIET, box[2] + ocr.QUIET, box[3] + ocr.QUIET)
        after, changed = np.array(picture), (np.array(picture) != before).any(2)
        rows, columns = np.nonzero(changed)
        assert around[0] <= columns.min() and columns.max() < around[2] and around[1] <= rows.min() and rows.max() < around[3]
        inked = np.array(mask) > 250
        assert (after[box[1] : box[3], box[0] : box[2]][inked].astype(int) - ink).__abs__().max() <= 6
        assert mask.getbbox() == (0, 0, *mask.size) and mask.size == (box[2] - box[0], box[3] - box[1])


def test_items_answer_what_is_written():
    tasks = set()
    poems = [("the apple", "a tree", "and house", "by river")]
    for seed in range(80):
        rng = np.random.default_rng(seed)
        item = ocr.draw_item(rng, wallpaper(1), WORDS, poems, FONTS, "train", 300, "made-up")
        tasks |= {turn.task for turn in item.turns}
        assert Image.open(io.BytesIO(item.picture)).format == "JPEG"
        assert "package:made-up" in item.keys and any(key.startswith("language:") for key in item.keys)
        for turn in item.turns:
            text = turn.answer if turn.task != "ocr_where" else None
            assert text is None or all(line.lower() in item.content for line in text.split("\n"))
            if turn.task in ("ocr_at", "ocr_where"):
                x1, y1, x2, y2 = map(int, BOX.search(turn.question + turn.answer).groups())
                assert 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000
    assert tasks == set(ocr.WORDINGS)


def test_each_wallpaper_and_its_words_are_of_one_split(monkeypatch, tmp_path):
    words = {language: [f"{language}word{i}" for i in range(60)] for language in ocr.ALPHABETS}
    names = [f"paper{i}" for i in range(30)]
    monkeypatch.setattr(ocr, "read_words", lambda language, cache: words[language])
    monkeypatch.setattr(ocr, "read_poems", lambda cache: [])
    monkeypatch.setattr(ocr, "read_fonts", lambda cache: FONTS)
    monkeypatch.setattr(ocr, "WALLPAPERS", ocr.WALLPAPERS[:1])
    monkeypatch.setattr(ocr, "PER_WALLPAPER", 2)
    monkeypatch.setattr(ocr, "read_wallpapers", lambda package, cache: ((name, wallpaper(0)) for name in names))
    items = list(ocr.make(tmp_path, 0, 300))
    assert {item.split for item in items} == {"train", "validation"} and len(items) == 2 * len(names)
    for i, item in enumerate(items):
        assert item.split == split_of(f"wallpaper {names[i // 2]}")
        found = re.findall(r"(?:en|de|ru|zh)word\d+", item.content)
        assert found and all(in_validation(f"text {word}") == (item.split == "validation") for word in found)
    again = list(ocr.make(tmp_path, 0, 300))
    assert [item.picture for item in items] == [item.picture for item in again]
