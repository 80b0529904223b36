"""Screens of real HTML templates in phone, tablet and desktop windows, with questions whose boxes come from the DOM.

Whole pages go to a split, and pages that share most of their text go together. Menus that all pages of a template share are asked
about in both, each text in a limited number of pictures. Training also asks where every widget is, of views and of parts of them.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from andesvl_jax.data.examples import SPLITS, pick
from andesvl_jax.prepare.chromium import Browser
from andesvl_jax.prepare.gui_screens import (
    Screen,
    Widget,
    look_ups,
    nameable,
    open_picture,
    parts,
    read_screen,
    turns_about,
    views,
)
from andesvl_jax.prepare.items import Card, Item, LeftOut, png, split_of
from andesvl_jax.prepare.packages import Package, members

SB_ADMIN_2 = Package(
    "npm", "startbootstrap-sb-admin-2", "4.1.4", 5_621_406,
    "5cb4d3875078a735953af3b1b12ed8271f1bcbb73ec0cb793d5ee81d22881b0f", "MIT",
)  # fmt: skip
SB_ADMIN = Package(
    "npm", "startbootstrap-sb-admin", "7.0.7", 61_627,
    "bcbfda7072fa8267ddfb114d925fe4dba15eca5ba92e6e08db92ef44a1345afa", "MIT",
)  # fmt: skip
FREELANCER = Package(
    "npm", "startbootstrap-freelancer", "7.0.7", 234_801,
    "32cc1c890a0205189bcfa764ce1a714301c50f7cb26e58c167491ca78dcbb505", "MIT",
)  # fmt: skip
AGENCY = Package(
    "npm", "startbootstrap-agency", "7.0.12", 1_941_340,
    "bc49d5677d6fd30ee77ce33c3baad729494153ffd94a893992414f2a8e8fecd4", "MIT",
)  # fmt: skip
TABLER = Package(
    "npm", "@tabler/preview", "1.2.0", 81_011_425,
    "97d1520d8f1e42b50d56eebc498074e51884271e5fc9fe8a1e3a2e6dfdd80b82", "MIT",
)  # fmt: skip


WEB_FILES = re.compile(r"\.(html|css|js|mjs|json|svg|png|jpe?g|gif|webp|ico|woff2?|ttf)$", re.IGNORECASE)


@dataclass(frozen=True)
class Template:
    """A package of pages. `unused` is a folder of photographs whose authors the package does not name."""

    package: Package
    folder: str  # of the pages; "" or with a slash at its end
    unused: str | None = None
    own_dark: bool = False  # whether its style sheet has a dark theme, as Bootstrap names it

    def uses(self, name: str) -> bool:
        """Whether a file of the package is given to the browser."""
        return WEB_FILES.search(name) is not None and not (self.unused and name.startswith(self.unused))


TEMPLATES = (
    Template(SB_ADMIN_2, ""),
    Template(SB_ADMIN, "dist/"),
    Template(FREELANCER, "dist/", "dist/assets/img/"),
    Template(AGENCY, "dist/", "dist/assets/img/"),
    Template(TABLER, "dist/", "dist/static/", own_dark=True),
)
CARD = Card(
    name="gui",
    summary="Screens of HTML templates: naming what is in a box, finding what is named, and what to tap.",
    packages=tuple(template.package for template in TEMPLATES),
    held_out="Two other frameworks are never fetched, so that they stay unseen.",
    questions=23_000,
)
WINDOWS = {"phone": (375, 720), "tablet": (768, 1024), "desktop": (1280, 800)}  # CSS pixels
DENSITY = 2  # pixels of a CSS pixel, as screens of phones have: letters are twice as high as in the style sheet
LOOKS = {"train": 1, "validation": 3}  # of a window: themes that it is seen in; few pages are validation
THEMES = ("plain", "plain", "dark", "tinted")
SCROLLS = 3  # screens of a page in one window, at most
SCROLL_BY = 0.85  # of the window's height
SETTLE = 0.5  # seconds after loading
REDRAW = 0.15  # seconds after a change
ASKED = 240  # times that one text of a template is asked about
COMMON = 0.3  # share of a template's pages from which on a text says nothing about one of them
ALIKE = 0.5  # share of texts that two pages have in common if they go to one split
SCRIPT = Path(__file__).with_name("screen.js")
STILL = "*, *::before, *::after { animation: none !important; transition: none !important; caret-color: transparent !important }"


def make(cache: Path, seed: int, side: int) -> Iterator[Item | LeftOut]:
    """Every page of every template in every window. Raises UserError where Chromium cannot be run."""
    with Browser() as browser:
        for template in TEMPLATES:
            files = dict(members(template.package, template.uses, cache))
            yield from items_of(browser, template, files, seed, side)


def items_of(browser: Browser, template: Template, files: Mapping[str, bytes], seed: int, side: int) -> Iterator[Item | LeftOut]:
    """The pages of one template, those of training first."""
    name = template.package.name
    texts = {page: texts_of(data) for page, data in files.items() if is_page(template, page)}
    contents = {page: f"page {name}/{first}" for page, first in groups(texts).items()}
    asked: Counter[tuple[str, str]] = Counter()
    met: dict[str, list[Widget]] = {split: [] for split in SPLITS}
    learned: set[bytes] = set()
    order = sorted(texts, key=lambda page: (SPLITS.index(split_of(contents[page])), page))
    for number, page in enumerate(order):
        rng = np.random.default_rng([seed, number])
        split = split_of(contents[page])
        keys = (f"package:{name}", f"page:{name}/{page}")
        count = 0
        for screen in screens(rng, browser, files, page, template.own_dark, LOOKS[split]):
            for view in views(rng, _askable(screen, asked, split), DENSITY * (side + 1) - 1):
                turns = turns_about(rng, view, [pick(rng, met[split]) for _ in range(8) if met[split]])
                picture = png(view.picture)
                if split == "train":
                    learned.add(picture)
                elif picture in learned:  # a part that pages share, such as the end of a menu
                    continue
                met[split] += view.widgets
                asked.update((split, widget.text) for widget in view.widgets)
                count += 1
                yield Item(picture, turns, contents[page], split, keys)
                if split == "train":
                    for part in parts(rng, view):
                        yield Item(png(part.picture), look_ups(rng, part), contents[page], split, keys)
                    yield Item(picture, look_ups(rng, view), contents[page], split, keys)
        if not count:
            yield LeftOut(f"page:{name}/{page}", "pages without two widgets to ask about")


def is_page(template: Template, name: str) -> bool:
    """Whether a file is one of the template's pages, not of a folder below them."""
    return name.startswith(template.folder) and name.endswith(".html") and "/" not in name[len(template.folder) :]


def _askable(screen: Screen, asked: Counter[tuple[str, str]], split: str) -> Screen:
    screen = nameable(screen)
    widgets = tuple(w for w in screen.widgets if asked[split, w.text] < ASKED)
    return Screen(screen.picture, widgets, screen.texts)


def screens(
    rng: np.random.Generator, browser: Browser, files: Mapping[str, bytes], page: str, own_dark: bool, looks: int
) -> Iterator[Screen]:
    """What each window shows of a page, `looks` times, in a theme of its own each, from the top downwards."""
    script = SCRIPT.read_text(encoding="utf-8")
    browser.open(files, page, SETTLE)
    for name in [name for name in WINDOWS for _ in range(looks)]:
        browser.resize(WINDOWS[name], DENSITY, phone=name == "phone")
        browser.evaluate(f"{theme_script(rng, own_dark)}; scrollTo(0, 0)")
        browser.wait(REDRAW)
        for scroll in range(SCROLLS):
            found: dict[str, Any] = browser.evaluate(script)
            yield read_screen(found, open_picture(browser.screenshot()), DENSITY)
            top = int((scroll + 1) * SCROLL_BY * found["height"])
            if top + found["height"] * (1 - SCROLL_BY) >= found["bottom"]:
                break
            browser.evaluate(f"scrollTo(0, {top})")
            browser.wait(REDRAW)


def theme_script(rng: np.random.Generator, own_dark: bool) -> str:
    """JavaScript that dresses the page: as it is, dark (by its own theme or inverted), or with its hues turned."""
    theme = pick(rng, THEMES)
    dark = theme == "dark" and own_dark
    inverted, turned = "invert(0.92) hue-rotate(180deg)", f"hue-rotate({int(rng.integers(40, 320))}deg)"
    colours = {"plain": "none", "dark": "none" if dark else inverted, "tinted": turned}[theme]
    style = f"{STILL} html {{ filter: {colours} }}" + ("" if dark else " html { background: white }")
    return f"""(() => {{
      document.documentElement.dataset.bsTheme = "{"dark" if dark else "light"}";
      const sheet = document.querySelector("#theme") || document.head.appendChild(document.createElement("style"));
      sheet.id = "theme";
      sheet.textContent = {json.dumps(style)};
    }})()"""


class _Texts(HTMLParser):
    """Collects the texts of a page, in lower case."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._silent = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._silent += tag in ("script", "style")
        self._add(*(value for name, value in attributes if name in ("placeholder", "value", "aria-label", "title")))

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("script", "style") and self._silent > 0

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self._add(data)

    def _add(self, *texts: str | None) -> None:
        self.found |= {" ".join(text.split()).lower() for text in texts if text and text.strip()}


def texts_of(page: bytes) -> frozenset[str]:
    """Every text of an HTML page in lower case, also what is not shown."""
    parser = _Texts()
    parser.feed(page.decode(errors="replace"))
    return frozenset(parser.found)


def groups(texts: Mapping[str, frozenset[str]]) -> dict[str, str]:
    """Page -> the first page, by name, that it shares more than ALIKE of its own texts with; texts of the template aside."""
    seen = Counter(text for found in texts.values() for text in found)
    own = {page: {text for text in found if seen[text] <= max(2, COMMON * len(texts))} for page, found in texts.items()}
    first: dict[str, str] = {}
    for page in sorted(texts):
        alike = (p for p in first if len(own[p] & own[page]) > ALIKE * min(len(own[p]), len(own[page])))
        first[page] = next((first[p] for p in alike), page)
    return first
