"""Figures of a manual: titles in several languages, labels as a made-up engine reads them, hostile pages and pictures."""

import hashlib
import io
import re
import struct
import sys
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from archives import archive
from PIL import Image, ImageDraw

import andesvl_jax as avl
from andesvl_jax.data.drawing import load_font
from andesvl_jax.data.examples import in_validation
from andesvl_jax.prepare import held_out, help_pages, help_reading
from andesvl_jax.prepare.help_pages import Figure, captions, open_figure, read_page, usable
from andesvl_jax.prepare.help_reading import Label, View, checked, draw_area, is_plausible, labels_of, turns_about, views
from andesvl_jax.prepare.items import Item, LeftOut, jpeg, png

BOX = re.compile(r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>")
SIDE = 160
NUMBERED = {"en": "Figure 1.2. ", "zh": "图 1.2. ", "de": "Abbildung 1.2. ", "ru": "Рисунок A.2. ", "es": "Figura 12. "}


def figure(title: str, *pictures: tuple[str, str], language="en") -> str:
    """A figure as DocBook's style sheets write it."""
    caption = lambda text: f'<div class="caption"><p>{text}</p></div>' if text else ""  # noqa: E731
    media = "".join(f'<div class="mediaobject"><img src="{name}" alt="x"/>{caption(text)}</div>' for name, text in pictures)
    title = f'<p class="title"><strong>{NUMBERED[language].replace(" ", chr(160), 1)}{title}</strong></p>'
    return f'<div class="figure"><a id="i"></a>{title}<div class="figure-contents">{media}</div></div><br class="figure-break"/>'


def page(*figures: str, text: str = "") -> bytes:
    return f"<html><head><title>T</title></head><body><p>{text}</p>{''.join(figures)}</body></html>".encode()


def figures_of(*figures: str) -> list[Figure]:
    return read_page("a.html", page(*figures))[0]


@pytest.mark.parametrize("language", NUMBERED)
def test_titles_lose_their_number_and_captions_stand_by_their_picture(language):
    title = 'The <span class="quote">“<span class="quote">Save</span>”</span>\n  dialog'
    whole = page(figure(title, ("a.png", ""), ("b.png", "After\n 2. it"), language=language), text="Menus &amp; Dialogs, x2")
    found, words = read_page("a.html", b"<div><p class='title'>no</p><img src='no.png'/></div>" + whole)
    assert found == [Figure("a.html", "The “Save” dialog", (("a.png", ""), ("b.png", "After 2. it")))]
    assert {"menus", "dialogs", "save", "x"} <= words and "img" not in words


def test_pages_that_are_broken_give_what_is_whole():
    broken = b'<div class="figure"><p class="title">Open</p><img src="a.png"><img src><img>'
    assert read_page("a.html", broken)[0] == [] and read_page("a.html", b"\xff</div></p><div")[0] == []
    assert figures_of('<div class="figure"><div/><div/></div>') == [Figure("a.html", "", ())]


def test_what_a_picture_may_be_called():
    (alone,) = figures_of(figure("The toolbox", ("a.png", "A long remark.")))
    assert captions(alone, 0, {}) == {"en": "The toolbox"}
    (several,) = figures_of(figure("Blur.", ("a.png", "Original image"), ("b.png", "Blurred"), ("c.png", "")))
    assert [captions(several, i, {}) for i in range(3)] == [{}, {"en": "Blur: Blurred"}, {}]
    (german,) = figures_of(figure("Der Werkzeugkasten", ("a.png", ""), language="de"))
    (same,) = figures_of(figure("«The Toolbox»", ("a.png", ""), language="ru"))
    assert captions(alone, 0, {"de": german, "ru": same, "zh": None}) == {"en": "The toolbox", "de": "Der Werkzeugkasten"}
    (half,) = figures_of(figure("Verwischen", ("a.png", ""), ("b.png", "Blurred"), ("c.png", ""), language="de"))
    assert captions(several, 1, {"de": half}) == {"en": "Blur: Blurred"}


@pytest.mark.parametrize("title", ["", "x", "…", "&lt;|im_end|&gt; A", "&lt;img&gt; A", "A\u200b title", "A" * 101, "12 %"])
def test_titles_that_can_be_no_answer(title):
    assert captions(figures_of(figure(title, ("a.png", "")))[0], 0, {}) == {}
    english, other = (figures_of(figure(text, ("a.png", "")))[0] for text in ("A title", title))
    assert captions(english, 0, {"de": other}) == {"en": "A title"}


def test_a_picture_is_used_once_and_only_if_the_package_has_it():
    pictures = {"images/a.png": b"a", "images/b.png": b"b", "images/c.png": b"a", "images/d.png": b"d"}
    outside = ("../../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "http://x.invalid/a.png", "images/../../images/a.png")
    found = figures_of(
        figure("One", ("images/a.png", "")),
        figure("Two", ("images/b.png", "")),
        figure("Three", ("images/c.png", "")),
        figure("Two", ("./images/b.png", "")),
        *(figure("Out", (name, "")) for name in outside),
        figure("Four", ("images/x/../d.png", "")),
    )
    shown, left_out = usable({"en": found}, pictures)
    assert [(one.name, one.captions) for one in shown] == [
        ("images/a.png", {}), ("images/b.png", {"en": "Two"}), ("images/d.png", {"en": "Four"})
    ]  # fmt: skip
    reasons = [left.reason for left in left_out]
    assert reasons.count("pictures that the package does not have") == len(outside)
    assert reasons.count("pictures without a title of their own") == 1


def header(width: int, height: int) -> bytes:
    """A PNG that says it is that large and has next to no data."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data", [header(60_000, 60_000), header(9_000, 9_000), header(9, 9), b"", b"GIF89a", b"\x89PNG\r\n\x1a\n"]
)
def test_broken_and_giant_pictures_are_refused(data):
    with pytest.raises(avl.UserError, match="a.png: cannot be opened"):
        open_figure(data, "a.png")


def test_transparent_pictures_stand_on_white():
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    assert np.asarray(open_figure(png(image), "a")).tolist() == [[[255] * 3, [10, 20, 30], [127] * 3]]


WORDS = ["Open", "Save as", "Blur radius:", "Opacity", "100.0", "Cancel", "Layer (new)", "Threshold", "Mode", "Reset all"]


def screenshot(number: int) -> tuple[Image.Image, list[Label]]:
    """A grey window with plates, each of its own colour, and a label for each; in every other one some are not sure."""
    rng = np.random.default_rng([7, number])
    image, labels = Image.new("RGB", (300, 260), (200, 200, 200)), []
    ImageDraw.Draw(image).point((0, number), (number, 0, 0))
    for row in range(8):
        for column in range(2):
            left, top = 10 + 145 * column + int(rng.integers(40)), 6 + 31 * row + int(rng.integers(6))
            box = (left, top, left + int(rng.integers(30, 90)), top + int(rng.integers(18, 22)))
            i = 2 * row + column
            ImageDraw.Draw(image).rectangle((*box[:2], box[2] - 1, box[3] - 1), (10 + 15 * i, 250 - 15 * i, 40))
            own = f"{WORDS[i % 10]} {number}" if i % 3 else WORDS[i % 10]
            labels.append(Label(own, box, number % 2 == 1 or i % 5 != 4))
    return image, labels


def plates(picture: Image.Image) -> dict[int, tuple[int, int, int, int]]:
    """Number of the plate -> its box, found in the pixels by colour."""
    pixels, found = np.asarray(picture).astype(int), {}
    for i in range(16):
        mask = np.abs(pixels - (10 + 15 * i, 250 - 15 * i, 40)).max(-1) <= 5
        if mask.sum() > 40:
            rows, columns = np.nonzero(mask)
            found[i] = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return found


def near(box, other, most=3.0) -> bool:
    return max(abs(a - b) for a, b in zip(box, other, strict=True)) <= most


def in_pixels(match: re.Match, size) -> list[float]:
    return [int(edge) * size[i % 2] / 1000 for i, edge in enumerate(match.groups())]


def test_views_cut_no_label_and_boxes_are_those_of_the_pixels():
    parts = wholes = 0
    for number in range(16):
        picture, labels = screenshot(number)
        for side in (SIDE, 280):
            for view in views(np.random.default_rng(number), picture, labels, side):
                parts, wholes = parts + (len(view.labels) < 16), wholes + (len(view.labels) == 16)
                assert max(view.picture.size) <= side and any(label.sure for label in view.labels)
                found = plates(view.picture)
                assert [labels[i].text for i in found] == [label.text for label in view.labels]
                assert all(near(label.box, box) for label, box in zip(view.labels, found.values(), strict=True))
                scale = view.picture.width / 300 if len(view.labels) == 16 else help_reading.SMALLEST_ZOOM
                assert not any(label.sure and 22 * scale * help_reading.EM < help_reading.SMALLEST_TEXT for label in view.labels)
    assert parts > 40 and wholes > 12


def test_labels_that_become_too_small_are_not_asked_about():
    picture, labels = screenshot(0)
    assert not [view for view in views(np.random.default_rng(0), picture.resize((75, 65)), [
        replace(label, box=tuple(edge // 4 for edge in label.box)) for label in labels
    ], SIDE)]  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_areas_hold_a_sure_label_and_whole_ones_only(seed):
    rng = np.random.default_rng(seed)
    size, most = (int(rng.integers(80, 700)), int(rng.integers(80, 700))), int(rng.integers(40, 400))
    corners = rng.integers(0, (size[0] - 20, size[1] - 10), (int(rng.integers(1, 60)), 2)).tolist()
    boxes = [(x, y, min(x + int(rng.integers(5, 150)), size[0]), min(y + 16, size[1])) for x, y in corners]
    labels = [Label(f"t{i}", box, i % 3 == 0) for i, box in enumerate(boxes)]
    area = draw_area(rng, size, labels, most)
    if area is None:
        return
    x1, y1, x2, y2 = area
    assert 0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1] and max(x2 - x1, y2 - y1) <= most
    inside = [box for box in boxes if x1 <= box[0] and y1 <= box[1] and box[2] <= x2 and box[3] <= y2]
    assert all(box[2] <= x1 or x2 <= box[0] or box[3] <= y1 or y2 <= box[1] for box in boxes if box not in inside)
    assert any(label.sure and label.box in inside for label in labels)


def test_questions_are_about_sure_labels_and_lists_are_complete():
    tasks = set()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        labels = [
            Label(f"Text {i}", (20 + i % 2 * 70, 10 + i // 2 * 30, 60 + i % 2 * 70, 30 + i // 2 * 30), True) for i in range(5)
        ]
        if seed % 2:
            labels[int(rng.integers(5))] = Label("Doubt", labels[2].box, False)
        shown = [labels[i] for i in rng.permutation(5)]
        asked = [label for label in shown if label.sure]
        turns = turns_about(rng, View(Image.new("RGB", (150, 100)), tuple(shown)), asked, asked)
        assert 0 < len(turns) <= help_reading.QUESTIONS
        for turn in turns:
            tasks.add(turn.task)
            if turn.task == "help_labels":
                assert seed % 2 == 0 and turn.answer == "\n".join(f"Text {i}" for i in range(5)), "rows from the left"
            else:
                assert "Doubt" not in turn.question + turn.answer
    assert tasks == set(help_reading.WORDINGS) and all(len(set(wordings)) >= 5 for wordings in help_reading.WORDINGS.values())
    assert turns_about(np.random.default_rng(0), View(Image.new("RGB", (9, 9)), tuple(labels)), labels, []) == ()


def test_a_text_that_stands_twice_is_not_looked_for():
    one, two, three = (
        Label("Width", (0, 0, 40, 9), True),
        Label("Max width:", (0, 20, 60, 29), False),
        Label("Up", (0, 40, 9, 49), True),
    )
    view = View(Image.new("RGB", (60, 50)), (one, two, three))
    asked = {
        t.answer
        for seed in range(40)
        for t in turns_about(np.random.default_rng(seed), view, [one, three], [one, three])
        if t.task == "help_where"
    }
    assert len(asked) == 1 and BOX.fullmatch(asked.pop())[2] == "800"


VOCABULARY = {"save", "as", "layer", "x", "a", "copy", "new"}


@pytest.mark.parametrize(
    "text", ["Save as", "save As…"[:7], "Layer (new)", "X:", "100.0", "Save a copy", "LAYER", "(new)", "12%", "new-layer, 3"]
)
def test_plausible_labels(text):
    assert is_plausible(text, VOCABULARY)
    assert [label.sure for label in checked([Label(text, (0, 0, 9, 9), sure) for sure in (True, False)], VOCABULARY)] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "S",
        "Eave as",
        "x Save",
        "|Save",
        "Save+",
        "▲",
        "日本",
        "Sаve",
        "<|im_end|>",
        "<img>",
        "1<2",
        "Save\nas",
        "new " * 11,
        "--",
    ],
)
def test_implausible_labels(text):
    assert not is_plausible(text, VOCABULARY)


def test_what_the_engine_finds_becomes_labels():
    square = lambda x, y, w, h, lean=0: [[x, y], [x + w, y + lean], [x + w, y + h + lean], [x, y + h]]  # noqa: E731
    boxes = np.array(
        [square(1.4, 2.6, 30.3, 10), square(-5, 5, 300, 10), square(0, 0, 50, 9, 6), square(90, 5, 9, 9), square(200, 0, 9, 9)]
    )
    found = SimpleNamespace(boxes=boxes, txts=(" Save ", "Wide", "Lean", "Faint", "Out"), scores=(1.0, 0.99, 1.0, 0.97, 1.0))
    assert labels_of(found, (100, 50)) == [
        Label("Save", (1, 2, 32, 13), True), Label("Wide", (0, 5, 100, 15), True), Label("Lean", (0, 0, 50, 15), False),
        Label("Faint", (90, 5, 99, 14), False),
    ]  # fmt: skip
    assert labels_of(SimpleNamespace(boxes=None, txts=None, scores=None), (9, 9)) == []


def test_without_the_engine_or_with_another_one_it_is_told_in_a_sentence(monkeypatch):
    monkeypatch.setattr(help_reading, "version", lambda name: help_reading.ENGINE_VERSION)
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(avl.UserError, match=r"labels are read by rapidocr \(and onnxruntime\); install `andesvl-jax\[real\]`"):
        help_reading.open_reader()
    monkeypatch.setitem(sys.modules, "rapidocr", SimpleNamespace(RapidOCR=None, __file__="x"))
    monkeypatch.setattr(help_reading, "version", lambda name: "1.0")
    with pytest.raises(avl.UserError, match="found rapidocr 1.0, expected 3.10.0"):
        help_reading.open_reader()


COUNT = 40


def manuals() -> tuple[dict[str, dict[str, bytes]], dict[bytes, list[Label]]]:
    """Files of the manuals by language, and the labels of each screenshot's pixels."""
    pictures, labels = {}, {}
    for i in range(COUNT):
        image, labels_here = screenshot(i)
        pictures[f"images/dialogs/s{i}.png"], labels[image.tobytes()] = png(image), labels_here
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    pictures |= {"images/examples/p.png": png(photo), "images/p.jpg": jpeg(photo), "images/broken.png": b"\x89PNG"}
    pictures |= {"images/thin.png": png(Image.new("RGB", (4000, 2))), "images/giant.png": header(60_000, 60_000)}
    odd = ("images/examples/p.png", "images/p.jpg", "images/broken.png", "images/thin.png", "images/giant.png", "images/gone.png")
    titles = {
        "en": "The “Thing {}” dialog",
        "zh": "“东西 {}”窗口",
        "de": "Dialog „Ding {}“",
        "ru": "Диалог «Вещь {}»",
        "es": "Diálogo {}",
    }
    text = " ".join(WORDS)
    files = {}
    for language, title in titles.items():
        pages = {
            f"page{i}.html": page(figure(title.format(i), (f"images/dialogs/s{i}.png", ""), language=language), text=text)
            for i in range(COUNT)
        }
        pages["odd.html"] = page(*(figure(f"Odd {name}", (name, "")) for name in odd))
        folder = help_pages.FOLDERS[language]
        files[language] = {folder + name: data for name, data in (pages | pictures).items()}
        files[language] |= {"usr/share/doc/x.html": page(figure("No", ("images/dialogs/s1.png", ""))), folder + "a/b.html": b""}
    return files, labels


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Items and what is left out of small manuals, through packages that lie in the cache."""
    (files, labels), packages, cache = manuals(), {}, tmp_path_factory.mktemp("cache")
    for language, package in help_pages.MANUALS.items():
        data = archive("deb", files[language], [("usr/share/doc/link.html", "/etc/passwd")])
        packages[language] = replace(package, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        (cache / packages[language].file_name).write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(help_pages, "MANUALS", packages)
        patch.setattr(help_pages, "open_reader", lambda: lambda picture: labels[picture.tobytes()])
        patch.setattr("subprocess.run", lambda *args, **options: pytest.fail("a client was started"))
        made = list(help_pages.make(cache, 3, SIDE))
        assert made == list(help_pages.make(cache, 3, SIDE)), "equal arguments give equal items"
    return [m for m in made if isinstance(m, Item)], [m for m in made if isinstance(m, LeftOut)]


def test_the_whole_source(made):
    items, left_out = made
    reasons = {left.reason.removeprefix("pictures ") for left in left_out}
    assert reasons >= {"that cannot be opened", "that the package does not have", "too large or thin to be shown whole"}
    assert {item.split for item in items} == {"train", "validation"}
    languages, known, told = {}, set(), set()
    for item in items:
        assert max(Image.open(io.BytesIO(item.picture)).size) <= SIDE and not any(map(held_out.is_held_out, item.keys))
        assert (item.split == "validation") == in_validation(item.content), "by figure"
        if item.turns[0].task == "help_caption":
            languages.setdefault(item.content, set()).update(key for key in item.keys if key.startswith("language"))
            continue
        texts = [text for turn in item.turns for text in ([] if BOX.search(turn.answer) else turn.answer.split("\n"))]
        (known if item.split == "train" else told).update(text.lower() for text in texts)
    dialogs = [found for content, found in languages.items() if "dialogs" in content]
    assert len(dialogs) == COUNT and all(found == {f"language:{x}" for x in help_pages.MANUALS} for found in dialogs)
    assert known and told and not known & told, "validation asks about no label that training shows"


def test_answers_are_those_of_the_screenshots(made):
    items, _ = made
    checked_tasks = set()
    for item in (item for item in items if item.turns[0].task != "help_caption"):
        number = int(re.search(r"s(\d+)\.png", item.content)[1])
        picture = Image.open(io.BytesIO(item.picture))
        labels, found = screenshot(number)[1], plates(picture)
        for turn in item.turns:
            checked_tasks.add(turn.task)
            if turn.task == "help_labels":
                assert sorted(turn.answer.split("\n")) == sorted(labels[i].text for i in found)
                continue
            box = in_pixels(BOX.search(turn.question + turn.answer), picture.size)
            (named,) = (labels[i] for i, other in found.items() if near(box, other))
            assert named.sure and named.text in (turn.question if turn.task == "help_where" else turn.answer)
    assert checked_tasks == set(help_reading.WORDINGS)


def test_equal_parts_stay_in_the_split_that_had_them_first():
    items = [
        Item(data, (), "c", split, ("k:1", "page:x"))
        for data, split in ((b"1", "train"), (b"1", "validation"), (b"2", "validation"))
    ]
    kept = list(help_pages.in_one_split([*items, LeftOut("a", "b")]))
    assert kept == [items[0], LeftOut("page:x", "parts of screenshots that the other split has too"), items[2], LeftOut("a", "b")]


def test_the_card_says_what_the_labels_are():
    assert "pseudo-labels" in help_pages.CARD.summary and f"{help_reading.LEAST_CONFIDENCE}" in help_pages.CARD.summary
    names = [package.name for package in help_pages.CARD.packages]
    assert len(names) == 5 and not any(name.endswith(f"-{x}") for name in names for x in held_out.LANGUAGES)


@pytest.mark.slow
def test_the_engine_reads_a_drawn_window():
    pytest.importorskip("rapidocr")
    image = Image.new("RGB", (240, 120), (230, 230, 230))
    places = {"Save as": (20, 20), "Opacity": (20, 60), "Cancel": (150, 60)}
    for text, place in places.items():
        ImageDraw.Draw(image).text(place, text, fill=(20, 20, 20), font=load_font("DejaVuSans", 15))
    labels = {label.text: label for label in help_reading.open_reader()(image)}
    assert set(labels) == set(places) and all(label.sure for label in labels.values())
    for text, (x, y) in places.items():
        assert near(labels[text].box[:2], (x, y), 6)


@pytest.mark.slow
def test_the_real_manuals_are_those_that_are_known(tmp_path):
    """Counts of the packages: figures, pictures that they show, and how many have a title of their own in each language."""
    pages = {language: dict(help_pages.read_manual(language, help_pages.is_page, tmp_path)) for language in help_pages.MANUALS}
    pictures = dict(help_pages.read_manual("en", help_pages.is_picture, tmp_path))
    figures = {x: [f for name in sorted(of) for f in read_page(name, of[name])[0]] for x, of in pages.items()}
    assert all(len(of) == 685 and len(figures[x]) == 1280 for x, of in pages.items())
    shown, left_out = usable(figures, pictures)
    assert len(shown) == 1526 and not [left for left in left_out if left.reason.endswith("does not have")]
    counts = {x: sum(x in one.captions for one in shown) for x in pages}
    assert counts["zh"] < 50 and all(counts[x] > 800 for x in ("en", "de", "ru", "es"))
    assert not [
        c for one in shown for c in one.captions.values() if re.match(r"(Figure|图|Abbildung|Figura|Рисунок)\s*[\dA-Z.]+\d", c)
    ]
