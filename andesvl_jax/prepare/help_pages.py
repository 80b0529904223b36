"""Figures of GIMP's help manual: their titles in five languages, and the labels of screenshots as an OCR engine reads them.

The labels are pseudo-labels: nobody has checked them one by one, and no benchmark is scored on them. `help_reading` says which
are kept. A figure, that is what the manual shows under one title, goes to one split with all its pictures, languages and
questions. Validation asks about no label that a picture of training shows.
"""

import hashlib
import io
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from andesvl_jax.data.examples import Turn, pick
from andesvl_jax.errors import UserError
from andesvl_jax.prepare.drawings import fitted
from andesvl_jax.prepare.help_reading import LEAST_CONFIDENCE, Label, Reader, checked, open_reader, turns_about, views
from andesvl_jax.prepare.items import Card, Item, LeftOut, jpeg, png, split_of
from andesvl_jax.prepare.packages import Package, members

VERSION, LICENCE = "2.10.34-2", "GFDL-1.2+"
MANUALS = {
    language: Package("deb", f"gimp-help-{name}", VERSION, size, sha256, LICENCE)
    for language, name, size, sha256 in (
        ("en", "en", 49_612_664, "a2deec76763aaf2fcdd197bac0736cdcb0770ba993d48d233329e1c92b0bfe36"),
        ("zh", "zh-cn", 49_619_036, "4b2c2c8c0e92dde4d278d668e0ae83fd3731ef1e717d76240ae60339b703efda"),
        ("de", "de", 51_882_324, "06d1f51828e0c68d373bbdd0d34c695e6405062143cd612407cd0fcf9531c199"),
        ("ru", "ru", 49_821_464, "6cc1afc044beda47a616cd2627ac5941bcca7ef7beb5edde7aa3b41cc61c3edd"),
        ("es", "es", 50_008_584, "4c1cd250dd4196d183439acc1c70d313bb4104658458181f93898bc1d7ae0a8e"),
    )
}
CARD = Card(
    name="help",
    summary=(
        "Figures of GIMP's manual: titles in five languages, and labels of screenshots. The labels are pseudo-labels, read by an "
        f"OCR engine with a confidence of {LEAST_CONFIDENCE} or more; no benchmark is scored on them."
    ),
    packages=tuple(MANUALS.values()),
    held_out="None of it is on the list; the manual in Japanese is never fetched, so that the language stays unseen.",
    questions=8_500,
)
FOLDERS = {language: f"usr/share/gimp/2.0/help/{'zh_CN' if language == 'zh' else language}/" for language in MANUALS}
CAPTIONING = {
    "en": ("What does this figure show?", "What is shown here?", "Give this figure a title.", "What is this a figure of?"),
    "zh": ("这张图展示了什么？", "图中是什么？", "请给这张图起一个标题。", "这张图的标题是什么？"),
    "de": (
        "Was zeigt diese Abbildung?",
        "Was ist hier zu sehen?",
        "Gib dieser Abbildung einen Titel.",
        "Wovon ist dies ein Bild?",
    ),
    "ru": ("Что показано на этом рисунке?", "Что здесь изображено?", "Озаглавь этот рисунок.", "Что это за рисунок?"),
    "es": ("¿Qué muestra esta figura?", "¿Qué se ve aquí?", "Pon un título a esta figura.", "¿De qué es esta figura?"),
}
NUMBER = re.compile(r"^\w+ (?:[A-Z\d]+\.)?\d+\. ?")  # what stands before a title: Figure 17.41.
LONGEST_CAPTION = 100  # characters
ORIGINAL = re.compile(r"\boriginal\b", re.IGNORECASE)  # a picture before the figure's filter: its title says what is not there
MAX_FIGURE_PIXELS = 8_000_000
SMALLEST_SIDE = 14  # pixels of the shorter side, once shrunk: one patch
SMALLEST_SCALE = 0.25  # below that a whole figure can hardly be told from another
LONGEST_SIDE, LONGEST_SHAPE = 2_000, 8  # of a picture that is read: pixels, times its shorter side
WITHOUT_LABELS = ("examples", "tutorials", "glossary")  # folders of photos and drawings
ASKED = 12  # times that one label is asked about by itself


@dataclass(frozen=True)
class Figure:
    """What stands under one title of a page: pictures with their captions, "" where there is none."""

    page: str
    title: str
    pictures: tuple[tuple[str, str], ...]  # name as the page writes it, caption

    @property
    def content(self) -> str:
        """What decides the split, in every language."""
        return f"figure {self.page} {' '.join(name for name, _ in self.pictures)}"


@dataclass(frozen=True)
class Shown:
    """A picture of the package, the figure that shows it first, and its captions by language."""

    name: str
    figure: Figure
    captions: Mapping[str, str]


def make(cache: Path, seed: int, side: int) -> Iterator[Item | LeftOut]:
    """Every figure with its titles, then parts of the screenshots with their labels.

    Raises:
      UserError: the OCR engine is missing; packages that cannot be had.
    """
    reader = open_reader()
    pages = {language: dict(read_manual(language, is_page, cache)) for language in MANUALS}
    yield from items_of(pages, dict(read_manual("en", is_picture, cache)), reader, seed, side)


def read_manual(language: str, wanted: Callable[[str], bool], cache: Path) -> Iterator[tuple[str, bytes]]:
    """The wanted files of a manual; their names, also those that are asked about, are from the manual's folder."""
    folder = FOLDERS[language]
    is_wanted = lambda name: name.startswith(folder) and wanted(name.removeprefix(folder))  # noqa: E731
    for name, data in members(MANUALS[language], is_wanted, cache):
        yield name.removeprefix(folder), data


def is_page(name: str) -> bool:
    """Whether a file of a manual is a page."""
    return name.endswith(".html") and "/" not in name


def is_picture(name: str) -> bool:
    """Whether a file of a manual is a picture."""
    return name.startswith("images/") and name.endswith((".png", ".jpg"))


def items_of(
    pages: Mapping[str, Mapping[str, bytes]], pictures: Mapping[str, bytes], reader: Reader, seed: int, side: int
) -> Iterator[Item | LeftOut]:  # fmt: skip
    """Items of pages (by language, then name) and pictures (by name as the pages write it).

    Args:
      reader: gives everything in a picture that looks like text, as `help_reading.open_reader` does.
    """
    parsed = {language: {name: read_page(name, data) for name, data in of.items()} for language, of in sorted(pages.items())}
    vocabulary = frozenset().union(*(words for _, words in parsed["en"].values()))
    figures = {language: [f for name in sorted(of) for f in of[name][0]] for language, of in parsed.items()}
    shown, left_out = usable(figures, pictures)
    yield from left_out
    yield from in_one_split(_questions(shown, pictures, lambda picture: checked(reader(picture), vocabulary), seed, side))


def _questions(
    shown: Iterable[Shown], pictures: Mapping[str, bytes], reader: Reader, seed: int, side: int
) -> Iterator[Item | LeftOut]:
    read: list[tuple[Shown, list[Label]]] = []
    for number, one in enumerate(shown):
        try:
            picture = open_figure(pictures[one.name], one.name)
        except UserError:
            yield LeftOut(f"page:{one.name}", "pictures that cannot be opened")
            continue
        yield from captioned(np.random.default_rng([seed, 0, number]), one, picture, side)
        if has_labels(one.name, picture):
            read.append((one, reader(picture)))
    yield from labelled(read, pictures, seed, side)


def in_one_split(items: Iterable[Item | LeftOut]) -> Iterator[Item | LeftOut]:
    """The same without pictures that the other split had first: parts of different screenshots can be equal."""
    splits: dict[bytes, str] = {}
    for item in items:
        if isinstance(item, Item) and splits.setdefault(hashlib.sha256(item.picture).digest(), item.split) != item.split:
            yield LeftOut(item.keys[1], "parts of screenshots that the other split has too")
        else:
            yield item


class _Page(HTMLParser):
    """Collects the figures and the words of a page that DocBook's style sheets have made."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[tuple[str, str], ...]]] = []
        self.words: set[str] = set()
        self._depth = 0  # of divisions, counted from that of the figure
        self._title: list[str] = []
        self._pictures: list[tuple[str, list[str]]] = []
        self._into: list[str] | None = None  # where text goes

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        kind = given.get("class")
        if tag == "div" and (self._depth or kind == "figure"):
            if not self._depth:
                self._title, self._pictures, self._into = [], [], None
            self._depth += 1
        if not self._depth:
            return
        if tag == "img" and given.get("src"):
            self._pictures.append((given["src"], []))
        elif tag == "p" and kind == "title":
            self._into = self._title
        elif kind == "caption" and self._pictures:
            self._into = self._pictures[-1][1]

    def handle_endtag(self, tag: str) -> None:
        if not self._depth or tag not in ("div", "p"):
            return
        if tag == "div" or self._into is self._title:
            self._into = None
        self._depth -= tag == "div"
        if not self._depth:
            captions = tuple((name, _plain(caption)) for name, caption in self._pictures)
            self.found.append((NUMBER.sub("", _plain(self._title)), captions))

    def handle_data(self, data: str) -> None:
        self.words.update(re.findall(r"[^\W\d_]+", data.lower()))
        if self._into is not None:
            self._into.append(data)


def _plain(parts: Iterable[str]) -> str:
    return " ".join("".join(parts).split())


def read_page(name: str, data: bytes) -> tuple[list[Figure], set[str]]:
    """The figures of an HTML page, and all words of its text in lower case."""
    page = _Page()
    page.feed(data.decode(errors="replace"))
    return [Figure(name, title, pictures) for title, pictures in page.found], page.words


def usable(
    figures: Mapping[str, Iterable[Figure]], pictures: Mapping[str, bytes]
) -> tuple[list[Shown], list[LeftOut]]:  # fmt: skip
    """Every picture that the English pages show, once, with the captions that it has in each language, and what is left out.

    A picture has no caption where its figure says nothing of it alone, where figures of several titles show it, where it is what
    a filter was applied to, and, in other languages, where the manual has not been translated.
    """
    others = {language: {figure.content: figure for figure in some} for language, some in figures.items() if language != "en"}
    shown: dict[bytes, Shown] = {}
    left_out: list[LeftOut] = []
    for figure in figures["en"]:
        for number, (written, _) in enumerate(figure.pictures):
            name = posixpath.normpath(written)
            if name not in pictures:
                left_out.append(LeftOut(f"page:{figure.page} {written}", "pictures that the package does not have"))
                continue
            found = captions(figure, number, {language: of.get(figure.content) for language, of in others.items()})
            digest = hashlib.sha256(pictures[name]).digest()
            first = shown.setdefault(digest, Shown(name, figure, found))
            if first.captions != found:
                shown[digest] = replace(first, captions={})
    left_out += [
        LeftOut(f"page:{one.name}", "pictures without a title of their own") for one in shown.values() if not one.captions
    ]
    return list(shown.values()), left_out


def captions(figure: Figure, number: int, others: Mapping[str, Figure | None]) -> dict[str, str]:
    """Language -> caption of one picture of a figure, English among them or nothing at all.

    Args:
      others: the same figure in other languages.
    """
    english = _caption(figure, number)
    if english is None or not is_sound(english) or (len(figure.pictures) > 1 and ORIGINAL.search(figure.pictures[number][1])):
        return {}
    found = {"en": english}
    for language, other in others.items():
        caption = None if other is None else _caption(other, number)
        if caption is not None and is_sound(caption) and _is_translated(figure, other, number):
            found[language] = caption
    return found


def _caption(figure: Figure, number: int) -> str | None:
    """The title, and what stands below the picture if there are several."""
    if len(figure.pictures) == 1:
        return figure.title
    own = figure.pictures[number][1]
    return f"{figure.title.rstrip(' .:。')}: {own}" if own else None


def _is_translated(english: Figure, other: Figure, number: int) -> bool:
    """Whether the letters of the title, and of what stands below one of several pictures, differ from the English ones."""
    letters = lambda text: "".join(filter(str.isalpha, text)).lower()  # noqa: E731
    pairs = [(english.title, other.title)]
    if len(english.pictures) > 1:
        pairs.append((english.pictures[number][1], other.pictures[number][1]))
    return all(letters(one) != letters(two) for one, two in pairs)


def is_sound(text: str) -> bool:
    """Whether a text can be an answer: neither empty nor long, without signs of markup or of the chat format."""
    return 1 < len(text) <= LONGEST_CAPTION and text.isprintable() and any(map(str.isalpha, text)) and not set("<>") & set(text)


def has_labels(name: str, picture: Image.Image) -> bool:
    """Whether a picture is likely a screenshot, by its name, and of a shape that the engine takes without making it huge."""
    shorter, longer = sorted(picture.size)
    plain = name.endswith(".png") and not set(WITHOUT_LABELS) & set(name.split("/"))
    return plain and shorter >= SMALLEST_SIDE and longer <= min(LONGEST_SIDE, LONGEST_SHAPE * shorter)


def open_figure(data: bytes, where: str) -> Image.Image:
    """A picture as RGB, over white where it is transparent. Raises UserError for damaged or oversized ones, before decoding."""
    try:
        opened = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        if opened.width * opened.height > MAX_FIGURE_PIXELS:
            raise OSError(f"{opened.width} x {opened.height} pixels")
        picture = opened.convert("RGBA")
    except Exception as error:  # Pillow's parsers raise many types on damaged files, and refuse the largest pictures
        raise UserError(
            f"{where}: cannot be opened ({error}), expected a PNG or JPEG of at most {MAX_FIGURE_PIXELS:,} pixels."
        ) from error
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB")


def captioned(rng: np.random.Generator, shown: Shown, picture: Image.Image, side: int) -> Iterator[Item | LeftOut]:
    """The whole picture, shrunk if need be, with its caption in each language; nothing for a picture without captions."""
    if not shown.captions:
        return
    small = fitted(picture, side, side) if max(picture.size) > side else picture
    if small.width < SMALLEST_SCALE * picture.width or min(small.size) < SMALLEST_SIDE:
        yield LeftOut(f"page:{shown.name}", "pictures too large or thin to be shown whole")
        return
    content = shown.figure.content
    for language, caption in shown.captions.items():
        turn = Turn("help_caption", pick(rng, CAPTIONING[language]), caption)
        yield Item(jpeg(small), (turn,), content, split_of(content), _keys(shown, language))


def labelled(
    read: Sequence[tuple[Shown, list[Label]]], pictures: Mapping[str, bytes], seed: int, side: int
) -> Iterator[Item | LeftOut]:
    """Views of the screenshots in which something can be read, with questions about that."""
    in_training = [(one, labels) for one, labels in read if split_of(one.figure.content) == "train"]
    known = {label.text.lower() for _, labels in in_training for label in labels}
    asked: Counter[tuple[str, str]] = Counter()
    for number, (one, labels) in enumerate(read):
        rng = np.random.default_rng([seed, 1, number])
        content, split = one.figure.content, split_of(one.figure.content)
        unseen = known if split == "validation" else frozenset()
        count = 0
        for view in views(rng, open_figure(pictures[one.name], one.name), labels, side):
            listed = [label for label in view.labels if label.sure and label.text.lower() not in unseen]
            turns = turns_about(rng, view, listed, [label for label in listed if asked[split, label.text] < ASKED])
            if turns:
                asked.update((split, label.text) for label in listed)
                count += 1
                yield Item(png(view.picture), turns, content, split, _keys(one, "en"))
        if not count:
            yield LeftOut(f"page:{one.name}", "screenshots without a label to ask about")


def _keys(shown: Shown, language: str) -> tuple[str, ...]:
    return (f"package:{MANUALS[language].name}", f"page:{shown.figure.page}", f"language:{language}")
