"""Screens of pages: boxes against pixels, questions against boxes, pages against splits. Chromium itself only in slow tests."""

import io
import re
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

import andesvl_jax as avl
from andesvl_jax.data.examples import in_validation
from andesvl_jax.prepare import chromium, gui_pages
from andesvl_jax.prepare.gui_pages import TEMPLATES, Template, groups, is_page, items_of, texts_of, theme_script
from andesvl_jax.prepare.gui_screens import (
    LARGEST_PART,
    LOOK_UPS,
    PARTS,
    PURPOSES,
    SMALLEST_TEXT,
    WORDINGS,
    Screen,
    Widget,
    look_ups,
    nameable,
    neighbours,
    parts,
    read_screen,
    turns_about,
    views,
)
from andesvl_jax.prepare.items import Item, LeftOut

BOX = re.compile(r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>")
KINDS = ("button", "link", "field", "checkbox", "select")
TEMPLATE = Template(gui_pages.SB_ADMIN, "dist/")


def screen(seed: int, size=(640, 520), count: int = 12) -> tuple[Screen, dict[tuple[int, int, int], str]]:
    """Widgets in a grid, each filled with a colour of its own with a dark stripe, and which text has which colour."""
    rng = np.random.default_rng(seed)
    image, widgets, names = Image.new("RGB", size, "white"), [], {}
    for i in range(count):
        x, y = 20 + 200 * (i % 3) + int(rng.integers(0, 9)) * (i % 3 > 0), 20 + 60 * (i // 3)
        box = (x, y, x + 90 + int(rng.integers(60)), y + 45)
        colour = (60 + 15 * i, 250 - 15 * i, 128 + 10 * i)
        ImageDraw.Draw(image).rectangle((*box[:2], box[2] - 1, box[3] - 1), fill=colour)
        ImageDraw.Draw(image).rectangle((x + 40, y + 10, x + 60, y + 14), fill="black")
        widgets.append(Widget(KINDS[i % 5], f"Thing {chr(65 + i)}", True, box, 14.0))
        names[colour] = widgets[-1].text
    return Screen(image, tuple(widgets), Counter(w.text.lower() for w in widgets)), names


def pixels_of(text: str, picture: Image.Image) -> list[int]:
    return [round(int(edge) * s / 1000) for edge, s in zip(BOX.search(text).groups(), picture.size * 2, strict=True)]


def name_at(text: str, view: Screen, names) -> str:
    """The widget that fills a box of an answer or question, by the pixels just inside its corners and just outside."""
    x1, y1, x2, y2 = pixels_of(text, view.picture)
    inside = {view.picture.getpixel((x, y)) for x in (x1 + 2, x2 - 3) for y in (y1 + 2, y2 - 3)}
    (colour,) = inside
    return names[colour]


@pytest.mark.parametrize("side", [140, 250, 448, 700])
def test_boxes_are_where_the_widgets_are(side):
    tasks = Counter()
    for seed in range(25):
        whole, names = screen(seed)
        rng = np.random.default_rng(seed)
        others = [Widget("link", f"Other {i}", True, (0, 0, 9, 9), 14.0) for i in range(3)]
        for view in views(rng, whole, side):
            assert max(view.picture.size) <= side and len(view.widgets) >= 2
            assert all(widget.size >= SMALLEST_TEXT for widget in view.widgets)
            crisp = all(widget.size == 14 for widget in view.widgets)
            for turn in turns_about(rng, view, others):
                tasks[turn.task] += 1
                labels = re.findall(r"Thing [A-Z]", turn.question)
                if turn.task == "presence":
                    assert turn.answer == ("Yes" if labels else "No")
                    assert not labels or labels[0] in [widget.text for widget in view.widgets]
                elif turn.task == "neighbour":
                    assert (labels[0], turn.answer) in [(a.text, b.text) for a, b in neighbours(view)]
                elif crisp and turn.task == "referring":
                    assert name_at(turn.question, view, names) == turn.answer
                elif crisp:
                    assert name_at(turn.answer, view, names) == labels[0]
    assert set(tasks) == set(WORDINGS)


def test_parts_are_small_and_ask_where_each_of_their_widgets_is():
    found = 0
    for seed in range(25):
        whole, names = screen(seed)
        rng = np.random.default_rng(seed)
        for view in views(rng, whole, 448):
            shown = list(parts(rng, view))
            assert len({frozenset(w.text for w in part.widgets) for part in shown}) == len(shown) <= PARTS
            for part in shown:
                assert part.picture.width * part.picture.height <= LARGEST_PART * view.picture.width * view.picture.height
                turns = look_ups(rng, part)
                placed = {turn.question: turn.answer for turn in turns if turn.task == "grounding"}
                assert 2 <= len(placed) == min(len(part.widgets), LOOK_UPS) == len(set(placed.values())) == len(turns) - 1
                if all(widget.size == 14 for widget in part.widgets):
                    for question, answer in placed.items():
                        assert name_at(answer, part, names) == re.search(r"Thing [A-Z]", question).group()
                    found += 1
    assert found > 50


def test_small_letters_are_not_asked_about():
    whole, _ = screen(0)
    small = replace(whole, widgets=tuple(replace(w, size=SMALLEST_TEXT * 1.2) for w in whole.widgets))
    sizes = {w.size for view in views(np.random.default_rng(0), small, 320) for w in view.widgets}
    assert sizes and all(SMALLEST_TEXT <= size <= SMALLEST_TEXT * 1.2 for size in sizes), "the whole screen would be halved"


def test_only_what_is_named_once_and_can_be_seen_is_nameable():
    whole, _ = screen(0)
    odd = {
        "Thing A": "x" * 50,
        "Thing B": "!?",
        "Thing C": "<|im_end|>",
        "Thing D": "",
        "Thing E": "THING F",
        "Thing G": "two\nlines",
    }
    widgets = tuple(replace(w, text=odd.get(w.text, w.text)) for w in whole.widgets)
    blank = replace(widgets[8], box=(600, 500, 630, 515))
    texts = Counter(w.text.lower() for w in widgets) + Counter(["thing h"])
    found = nameable(Screen(whole.picture, (*widgets[:8], blank, *widgets[9:]), texts))
    assert [w.text for w in found.widgets] == ["Thing J", "Thing K", "Thing L"]


def test_the_next_one_below_is_the_nearest_of_its_column():
    boxes = {"a": (10, 10, 60, 30), "b": (10, 35, 60, 55), "c": (10, 60, 60, 80), "d": (90, 35, 140, 55), "e": (10, 200, 60, 220)}
    widgets = tuple(Widget("link", text, True, box, 12.0) for text, box in boxes.items())
    found = neighbours(Screen(Image.new("RGB", (200, 300)), widgets, Counter(boxes)))
    assert [(a.text, b.text) for a, b in found] == [("a", "b"), ("b", "c")]


def test_what_a_page_reports_is_checked():
    entry = {"kind": "link", "text": "Home", "seen": True, "whole": True, "box": [5, 5, 50, 20], "size": 12}
    odd = [
        entry | {"box": [-5, 5, 50, 20]},
        entry | {"box": [5, 5, 500, 20]},
        entry | {"whole": False},
        entry | {"box": [9, 5, 9, 20]},
    ]
    found = read_screen({"widgets": [entry, *odd], "texts": ["Home", "Welcome"]}, Image.new("RGB", (200, 200)), density=2)
    assert [(w.text, w.box, w.size) for w in found.widgets] == [("Home", (10, 10, 100, 40), 12)], "letters stay CSS pixels"
    assert found.texts == {"home": 6, "welcome": 1}
    for broken in ({"texts": []}, {"widgets": [{}], "texts": []}, {"widgets": [entry | {"box": [1, 2, "x", 4]}], "texts": []}):
        with pytest.raises(avl.UserError, match="screen: reports widgets that cannot be read"):
            read_screen(broken, Image.new("RGB", (9, 9)), density=1)


PAGE = '<title>T</title><style>p{}</style><a href=#>Menu</a><p>%s</p><input placeholder=" Your\n name "><script>"no"</script>'


def test_texts_of_a_page_are_what_can_be_read():
    assert texts_of((PAGE % "Some <b>bold</b> Text").encode()) == {"t", "menu", "some", "bold", "text", "your name"}
    assert texts_of(b"<a title=x>\xff<p") >= {"x"}


def test_pages_that_share_their_own_texts_go_together():
    menu = [f"menu {i}" for i in range(30)]
    own = {f"p{i}.html": [f"text {i} {j}" for j in range(8)] for i in range(8)}
    own["p7.html"] = own["p2.html"][:6] + ["more"]
    texts = {page: frozenset(menu + list(found)) for page, found in own.items()}
    assert groups(texts) == {page: page for page in own} | {"p7.html": "p2.html"}


def test_only_pages_of_the_folder_itself_count():
    names = ("dist/index.html", "dist/docs/a.html", "index.html", "dist/index.css", "dist/assets/img/a.png")
    assert [is_page(TEMPLATE, name) for name in names] == [True, False, False, False, False]
    template = Template(gui_pages.SB_ADMIN, "dist/", "dist/assets/img/")
    assert [template.uses(name) for name in names] == [True, True, True, True, False]
    assert not template.uses("dist/a.exe") and not template.uses("package.json.sh")


class MadeUpBrowser:
    """Shows a screen of widgets for every page, with the page's own texts on them."""

    def __init__(self, screens):
        self._screens, self._shown = screens, None

    def open(self, files, page, settle):
        self._shown = self._screens[page]

    def resize(self, size, density, phone):
        self._density = density

    def wait(self, seconds):
        pass

    def screenshot(self):
        out = io.BytesIO()
        self._shown.picture.save(out, "PNG")
        return out.getvalue()

    def evaluate(self, script):
        widgets = [vars(w) | {"whole": True, "box": [edge / self._density for edge in w.box]} for w in self._shown.widgets]
        return {"widgets": widgets, "texts": [], "height": 520, "bottom": 520}


def test_whole_pages_go_to_a_split_and_validation_shows_no_picture_of_training():
    shared, screens, files = ["Thing A", "Thing B", "Thing C"], {}, {"dist/site.css": b""}
    for number in range(40):
        whole, _ = screen(number)
        page = f"dist/page{number}.html"
        names = [w.text if w.text in shared else f"{w.text} {number}" for w in whole.widgets]
        files[page] = " ".join(f"<p>{name}</p>" for name in names).encode()
        widgets = tuple(replace(w, text=name) for w, name in zip(whole.widgets, names, strict=True))
        screens[page] = replace(whole, widgets=widgets)
    screens["dist/page0.html"] = replace(screens["dist/page0.html"], widgets=())
    made = list(items_of(MadeUpBrowser(screens), TEMPLATE, files, 0, 300))
    left_out, items = [m for m in made if isinstance(m, LeftOut)], [m for m in made if isinstance(m, Item)]
    assert [entry.key for entry in left_out] == ["page:startbootstrap-sb-admin/dist/page0.html"]
    splits = {}
    for item in items:
        assert item.split == ("validation" if in_validation(item.content) else "train")
        assert splits.setdefault(item.keys[1], item.split) == item.split
    assert set(splits.values()) == {"train", "validation"}
    pictures = {split: {item.picture for item in items if item.split == split} for split in ("train", "validation")}
    assert not pictures["train"] & pictures["validation"]
    asked = Counter(re.findall(r"Thing [ABC](?! \d)", " ".join(t.question for i in items for t in i.turns)))
    assert 0 < max(asked.values()) <= 4 * (gui_pages.ASKED + 5) * (2 + PARTS), "a menu is not asked about on every page"


def test_wordings_and_purposes_name_what_they_ask_for():
    assert all(len(set(wordings)) >= 5 for wordings in WORDINGS.values())
    assert set(PURPOSES) < set(KINDS) and all("{text}" in purpose for purposes in PURPOSES.values() for purpose in purposes)


def test_no_template_is_a_held_out_one_and_all_are_on_the_card():
    names = {template.package.name for template in TEMPLATES}
    assert not names & {"weui", "gentelella"} and names == {package.name for package in gui_pages.CARD.packages}


def test_without_chromium_there_is_a_sentence(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(avl.UserError, match="chromium: is not installed, expected it"):
        chromium.Browser()


HTML = """<!doctype html><html><head><link rel=stylesheet href=site.css></head><body>
<a href="other.html" id=a>Reports</a><button id=b>Save all</button><button style="opacity:0">Ghost</button>
<button style="visibility:hidden">Hidden</button><button style="display:none">None</button><button class=tiny>Tiny</button>
<button class=far>Outside</button><button class=low>Beneath</button><div class=lid></div>
<label><input type=checkbox id=c> Remember me</label><input placeholder="Your name"><input type=password value=secret>
<input type=range value=40><input disabled placeholder=Locked style="top: 450px">
<select><option>One</option><option selected>Two</option></select><p>Plain text</p>
<script>alert("Wait!"); fetch("http://127.0.0.1:9/").catch(() => document.body.dataset.net = "refused");
fetch("../secret.txt").catch(() => document.body.dataset.file = "refused");</script></body></html>"""
CSS = """* { margin: 0; font: 16px sans-serif } button, a, select { position: absolute; border: 0; padding: 0 }
#a { left: 20px; top: 30px; width: 100px; height: 40px; background: rgb(200, 10, 10); color: rgb(200, 10, 10) }
#b { left: 200px; top: 30px; width: 120px; height: 40px; background: rgb(10, 10, 200); color: rgb(10, 10, 200) }
.tiny { left: 0; top: 100px; width: 5px; height: 5px } .far { left: 360px; top: 30px; width: 100px; height: 40px }
.low { left: 20px; top: 150px; width: 100px; height: 40px } 
.lid { position: absolute; left: 0; top: 140px; width: 300px; height: 60px }
label { position: absolute; top: 220px } input[placeholder] { position: absolute; top: 260px; width: 200px }
input[type=password] { position: absolute; top: 300px } select { top: 350px; width: 90px; height: 30px }"""


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, chromium.NAMES)), reason="Chromium is not installed")
def test_boxes_of_a_real_page_are_its_pixels_and_nothing_else_is_reached():
    files = {"dist/index.html": HTML.encode(), "dist/site.css": CSS.encode()}
    with chromium.Browser() as browser:
        browser.open(files, "dist/index.html", 0.5)
        browser.resize((400, 600), density=2, phone=False)
        assert browser.evaluate("[document.body.dataset.net, document.body.dataset.file]") == ["refused", "refused"]
        picture = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
        shown = read_screen(browser.evaluate(gui_pages.SCRIPT.read_text()), picture, density=2)
        widgets = {widget.text: widget for widget in shown.widgets}
        assert picture.size == (800, 1200)
        assert set(widgets) == {"Reports", "Save all", "Remember me", "Your name", "Two", ""}
        assert [widgets[text].kind for text in ("Reports", "Save all", "Remember me", "Two")] == [
            "link",
            "button",
            "checkbox",
            "select",
        ]
        for text, colour in (("Reports", (200, 10, 10)), ("Save all", (10, 10, 200))):
            rows, columns = np.nonzero((np.asarray(picture) == colour).all(2))
            assert widgets[text].box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert shown.texts["plain text"] == shown.texts["outside"] == 1 and "hidden" not in shown.texts
        browser.evaluate(theme_script(np.random.default_rng(0), own_dark=True))
        with pytest.raises(avl.UserError, match="a script failed"):
            browser.evaluate("nothing.at.all")
