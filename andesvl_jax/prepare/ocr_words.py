"""Words, short lines and Chinese poems written over parts of real wallpapers: what does it say, and where.

Words are those of wordfreq's short lists (German, English, Russian, Chinese), poems those of fortunes-zh. Both a word and a
wallpaper belong to one split, so that validation has neither words nor wallpapers of training.
"""

import functools
import gzip
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgpack
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from andesvl_jax.data.drawing import Box, box_text, font_folder
from andesvl_jax.data.examples import Turn, pick
from andesvl_jax.data.pictures import decode_picture
from andesvl_jax.errors import UserError
from andesvl_jax.prepare.items import Card, Item, jpeg, split_of
from andesvl_jax.prepare.packages import Package, members, read

WORDFREQ = Package(
    "wheel", "wordfreq", "3.1.1", 56_834_549, "4b1c6ecffc6198be3396d5cf871c4423ca71c907c231348d352dd54d62b97473",
    "Apache-2.0, data CC-BY-SA-4.0",
)  # fmt: skip
POEMS = Package(
    "deb", "fortunes-zh", "2.98", 546_072, "211c5ddee59d0ae74ce01cbfd02f7c8714740bae1835d5661eb2254edd739105", "GPL-2+"
)  # fmt: skip
LATO = Package(
    "deb", "fonts-lato", "2.0-2.1", 2_695_828, "86f50af146a7df9eca4e69f0262e73e708908435ebfa833df797adfa08843bc5", "OFL-1.1"
)  # fmt: skip
WQY = Package(
    "deb", "fonts-wqy-microhei", "0.2.0-beta-3.1", 1_605_712,
    "239163df984eea5c9da3b551aee374936222cdbd67f1a1be3cdcf3d76143ad66", "Apache-2.0 or GPL-3",
)  # fmt: skip
WALLPAPERS = (
    Package(
        "deb", "mate-backgrounds", "1.26.0-1", 46_638_500,
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04", "GPL-2+, CC-BY-SA",
    ),
    Package(
        "deb", "plasma-workspace-wallpapers", "4:5.27.5-2", 94_047_772,
        "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b", "GPL-2+, LGPL-3, CC-BY-SA-4.0",
    ),
    Package(
        "deb", "gnome-backgrounds", "43.1-1", 32_546_832,
        "a670dea21572652127d6e55f9cdb3a226d0037854fdbfd037003c7d00ee0dc4e", "CC-BY-SA-3.0",
    ),
)  # fmt: skip
CARD = Card(
    name="ocr",
    summary="Words, lines and poems in English, German, Russian and Chinese over wallpapers, turned and coloured, but legible.",
    packages=(WORDFREQ, POEMS, LATO, WQY, *WALLPAPERS),
    held_out="Japanese and Arabic are never written.",
    questions=4_900,
)
ALPHABETS = {"en": r"[a-z]{2,12}", "de": r"[a-zäöüß]{2,14}", "ru": r"[а-яё]{2,13}", "zh": r"[\u4e00-\u9fff]{1,5}"}
LATO_STYLES = ("Regular", "Bold", "Italic", "Light", "Black")
DEJAVU = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")
KINDS = ("word", "word", "line", "several", "poem")
MAX_WORDS_BYTES = 16 << 20  # of one list, unpacked
PER_WALLPAPER = 80
LARGEST_WALLPAPER = 1280  # pixels, once shrunk
SMALLEST_FILE, LARGEST_FILE = 1 << 10, 16 << 20  # bytes of a wallpaper
SMALLEST_TEXT = {"en": 13, "de": 13, "ru": 13, "zh": 18}  # pixels per em
LARGEST_TEXT = 56
SLANT = 20  # degrees either way
CONTRAST = 3.0  # WCAG 2 contrast of the text with all but 5 % of what it stands on; large text needs 3:1
QUIET = 2  # pixels around the text that the contrast is measured in
TRIES = 20

WORDINGS = {
    "ocr_text": (
        "What does it say?",
        "Read the text.",
        "What is written in the picture?",
        "Write down the text.",
        "Which words do you see?",
        "图中写着什么？",
    ),
    "ocr_lines": (
        "Read the lines.",
        "Write down the text line by line.",
        "What do the lines say?",
        "Copy the lines of this text.",
        "Which lines are written here?",
        "请逐行读出图中的文字。",
    ),
    "ocr_at": (
        "What is written at {box}?",
        "Read the text in {box}.",
        "Which word stands in {box}?",
        "What does the text at {box} say?",
        "请读出{box}处的文字。",
    ),
    "ocr_where": (
        "Locate <|object_ref_start|>{text}<|object_ref_end|>.",
        "Where does it say {text}?",
        "Give the box of the word {text}.",
        "Find the text {text}.",
        "At which place is {text} written?",
    ),
}


@dataclass(frozen=True)
class Writing:
    """Lines of text in a font, as it will be laid over a picture."""

    lines: tuple[str, ...]
    language: str
    font: bytes | str  # contents of a font file, or its path
    size: int  # pixels per em
    degrees: float


def make(cache: Path, seed: int, side: int) -> Iterator[Item]:
    """PER_WALLPAPER pictures of each wallpaper."""
    words = {language: read_words(language, cache) for language in ALPHABETS}
    poems, fonts = read_poems(cache), read_fonts(cache)
    for package in WALLPAPERS:
        for name, wallpaper in read_wallpapers(package, cache):
            split = split_of(f"wallpaper {name}")
            own_words = {language: [w for w in some if split_of(f"text {w}") == split] for language, some in words.items()}
            own_poems = [poem for poem in poems if split_of(f"poem {poem[0]}") == split]
            rng = np.random.default_rng([seed, *name.encode()])
            for _ in range(PER_WALLPAPER):
                yield draw_item(rng, wallpaper, own_words, own_poems, fonts, split, side, package.name)


def read_words(language: str, cache: Path) -> list[str]:
    """Words of a short list of wordfreq, more frequent ones first."""
    name = f"wordfreq/data/small_{language}.msgpack.gz"
    return parse_words(read(WORDFREQ, [name], cache)[name], ALPHABETS[language])


def parse_words(data: bytes, alphabet: str) -> list[str]:
    """wordfreq's format `cB`: a header, then a list of words for every centibel of frequency. Raises UserError for others."""
    with gzip.open(io.BytesIO(data)) as file:
        unpacked = msgpack.unpackb(file.read(MAX_WORDS_BYTES), max_map_len=100)
    if not isinstance(unpacked, list) or not unpacked or unpacked[0] != {"format": "cB", "version": 1}:
        raise UserError("wordfreq: a word list has another format than cB 1, expected that.")
    pattern = re.compile(alphabet)
    return [word for level in unpacked[1:] for word in level if pattern.fullmatch(word)]


def read_poems(cache: Path) -> list[tuple[str, ...]]:
    """The lines of each poem of Tang and Song in fortunes-zh."""
    names = [f"usr/share/games/fortunes/{name}" for name in ("tang300", "song100")]
    return [poem for data in read(POEMS, names, cache).values() for poem in parse_poems(data.decode())]


def parse_poems(text: str) -> list[tuple[str, ...]]:
    """Poems between lines of `%`; coloured lines are titles and poets."""
    poems = []
    for part in text.split("\n%"):
        lines = [line.strip() for line in part.splitlines() if line.strip() and "\x1b" not in line]
        halves = [half for line in lines for half in re.findall(r"[\u4e00-\u9fff]+", line)]
        if len(halves) >= 2 and max(map(len, halves)) <= 9:
            poems.append(tuple(halves))
    return poems


def read_fonts(cache: Path) -> dict[str, list[bytes | str]]:
    """Fonts by language."""
    names = [f"usr/share/fonts/truetype/lato/Lato-{style}.ttf" for style in LATO_STYLES]
    wqy = "usr/share/fonts/truetype/wqy/wqy-microhei.ttc"
    latin = [*read(LATO, names, cache).values(), *(str(font_folder() / f"{name}.ttf") for name in DEJAVU)]
    chinese = [read(WQY, [wqy], cache)[wqy]]
    return {"en": [*latin, *chinese], "de": latin, "ru": latin, "zh": chinese}


def read_wallpapers(package: Package, cache: Path) -> Iterator[tuple[str, Image.Image]]:
    """Each wallpaper once, whatever sizes and shades of it there are, at most LARGEST_WALLPAPER wide or high."""
    seen: set[str] = set()
    is_picture = lambda name: name.endswith((".jpg", ".png", ".webp")) and "/screenshot." not in name  # noqa: E731
    for name, data in members(package, is_picture, cache):
        key = wallpaper_key(name)
        if key not in seen and SMALLEST_FILE < len(data) < LARGEST_FILE:
            seen.add(key)
            picture = decode_picture(data, f"{package.name}: {name}")
            picture.thumbnail((LARGEST_WALLPAPER, LARGEST_WALLPAPER))
            if not is_flat(picture):
                yield f"{package.name}/{key}", picture


def is_flat(picture: Image.Image) -> bool:
    """Whether half of the picture has one and the same colour, as those have that are transparent."""
    colours = np.asarray(picture.resize((64, 64), Image.Resampling.NEAREST)).reshape(-1, 3)
    return int(np.unique(colours, axis=0, return_counts=True)[1].max()) > len(colours) // 2


def wallpaper_key(name: str) -> str:
    """What a wallpaper is called whatever its size and shade: the folder with `contents`, else the start of the file's name."""
    parts = PurePosixPath(name).parts
    if "contents" in parts:
        return parts[parts.index("contents") - 1]
    return re.split(r"[_-](?=\d|[dl]$)", PurePosixPath(name).stem)[0]


def draw_item(
    rng: np.random.Generator, wallpaper: Image.Image, words: Mapping[str, Sequence[str]], poems: Sequence[tuple[str, ...]],
    fonts: Mapping[str, Sequence[bytes | str]], split: str, side: int, package: str,
) -> Item:  # fmt: skip
    """One part of a wallpaper with writing on it, and the questions."""
    while True:
        picture = draw_background(rng, wallpaper, side)
        writings = draw_writings(rng, words, poems, fonts)
        placed = [place(rng, picture, writing) for writing in writings]
        if None in placed or any(_touch(one, other) for i, one in enumerate(placed) for other in placed[i + 1 :]):
            continue
        boxes = [write(rng, picture, mask, box) for mask, box in placed]
        if None in boxes:
            continue
        texts = ["\n".join(writing.lines) for writing in writings]
        languages = sorted({f"language:{writing.language}" for writing in writings})
        turns = turns_about(rng, texts, [box_text(box, *picture.size) for box in boxes])
        content = "text " + "; ".join(sorted(texts)).lower().replace("\n", " ")
        return Item(jpeg(picture), turns, content, split, (*languages, f"package:{package}"))


def draw_background(rng: np.random.Generator, wallpaper: Image.Image, side: int) -> Image.Image:
    """A part of the wallpaper, shrunk or as it is."""
    width, height = int(rng.integers(side * 2 // 3, side + 1)), int(rng.integers(side // 2, side + 1))
    zoom = 1 + rng.random() * (min(wallpaper.width / width, wallpaper.height / height, 3) - 1)
    across, down = min(wallpaper.width, int(width * zoom)), min(wallpaper.height, int(height * zoom))
    x, y = int(rng.integers(wallpaper.width - across + 1)), int(rng.integers(wallpaper.height - down + 1))
    return wallpaper.resize((width, height), Image.Resampling.BICUBIC, (x, y, x + across, y + down))


def draw_writings(
    rng: np.random.Generator, words: Mapping[str, Sequence[str]], poems: Sequence[tuple[str, ...]],
    fonts: Mapping[str, Sequence[bytes | str]],
) -> list[Writing]:  # fmt: skip
    """A word, a line of words, two or three words apart, or neighbouring lines of a poem."""
    kind, language = pick(rng, KINDS), pick(rng, tuple(ALPHABETS))
    if kind == "poem" and poems:
        poem, count = pick(rng, poems), int(rng.integers(1, 5))
        start = int(rng.integers(max(1, len(poem) - count + 1)))
        return [_writing(rng, poem[start : start + count], "zh", fonts)]
    draw = lambda: cased(rng, pick(rng, words[language]))  # noqa: E731
    if kind == "several":
        several = list(dict.fromkeys(draw() for _ in range(int(rng.integers(2, 4)))))
        low = [word.lower() for word in several]
        if not any(one in other for i, one in enumerate(low) for j, other in enumerate(low) if i != j):
            return [_writing(rng, (word,), language, fonts) for word in several]
    if kind == "line":
        line = ("" if language == "zh" else " ").join(draw() for _ in range(int(rng.integers(2, 4))))
        return [_writing(rng, (line,), language, fonts)]
    return [_writing(rng, (draw(),), language, fonts)]


def cased(rng: np.random.Generator, word: str) -> str:
    """The word as it is, capitalized or in capitals."""
    return pick(rng, (word, word, word.capitalize(), word.upper()))


def _writing(
    rng: np.random.Generator, lines: tuple[str, ...], language: str, fonts: Mapping[str, Sequence[bytes | str]]
) -> Writing:
    size = int(np.exp(rng.uniform(np.log(SMALLEST_TEXT[language]), np.log(LARGEST_TEXT))))
    degrees = float(rng.integers(-SLANT, SLANT + 1)) if rng.random() < 0.5 else 0.0
    return Writing(lines, language, pick(rng, fonts[language]), size, degrees)


def place(rng: np.random.Generator, picture: Image.Image, writing: Writing) -> tuple[Image.Image, Box] | None:
    """The writing as a mask and where it goes, at most at its size; None where even the smallest size has no room."""
    for size in range(writing.size, SMALLEST_TEXT[writing.language] - 1, -2):
        mask = text_block(writing.lines, writing.font, size)
        mask = mask.rotate(writing.degrees, Image.Resampling.BICUBIC, expand=True) if writing.degrees else mask
        mask = mask.crop(mask.getbbox())
        room = picture.width - mask.width - 2 * QUIET, picture.height - mask.height - 2 * QUIET
        if min(room) > 0:
            x, y = (QUIET + int(rng.integers(edge)) for edge in room)
            return mask, (x, y, x + mask.width, y + mask.height)
    return None


def text_block(lines: Sequence[str], font: bytes | str, size: int) -> Image.Image:
    """Ink of left-aligned lines as an "L" image. Raises UserError where the font lacks a character."""
    typeface = open_font(font, size)
    if missing := [c for line in lines for c in line if not c.isspace() and not has_glyph(font, c)]:
        raise UserError(f"font: has no glyph for {missing[0]!r}, expected one for every character that is written.")
    height = round(1.3 * size)
    width = max(round(typeface.getlength(line)) for line in lines) + 2 * size
    mask = Image.new("L", (width, height * len(lines) + 2 * size))
    for i, line in enumerate(lines):
        ImageDraw.Draw(mask).text((size, size + height * i), line, fill=255, font=typeface)
    return mask.crop(mask.getbbox())


@functools.lru_cache(maxsize=512)
def open_font(font: bytes | str, size: int) -> ImageFont.FreeTypeFont:
    """A font file at `size` pixels per em."""
    file = io.BytesIO(font) if isinstance(font, bytes) else font
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=1 << 16)
def has_glyph(font: bytes | str, character: str) -> bool:
    """Whether the font draws the character otherwise than one that no font has."""

    def drawn(text: str) -> bytes:
        mask = Image.new("L", (40, 40))
        ImageDraw.Draw(mask).text((4, 4), text, fill=255, font=open_font(font, 24))
        return mask.tobytes()

    return drawn(character) != drawn("\U0010fffe")


def _touch(one: tuple[Image.Image, Box], other: tuple[Image.Image, Box]) -> bool:
    (a, b, c, d), (e, f, g, h) = one[1], other[1]
    return a - 4 < g and e - 4 < c and b - 4 < h and f - 4 < d


def write(rng: np.random.Generator, picture: Image.Image, mask: Image.Image, box: Box) -> Box | None:
    """Writes in a colour that stands out, over a plate where none does; None where not even that helps. Returns the box."""
    around = (box[0] - QUIET, box[1] - QUIET, box[2] + QUIET, box[3] + QUIET)
    for attempt in range(TRIES):
        ground = np.asarray(picture.crop(around))
        if attempt >= TRIES // 2:
            plate = Image.new("RGB", picture.size, tuple(rng.integers(0, 256, 3).tolist()))
            part = Image.blend(picture, plate, 0.8).crop(around)
            ground = np.asarray(part)
        ink = tuple(rng.integers(0, 256, 3).tolist()) if attempt % 2 == 0 else pick(rng, ((255,) * 3, (0,) * 3))
        if legibility(ground, ink) >= CONTRAST:
            if attempt >= TRIES // 2:
                picture.paste(part, around[:2])
            picture.paste(ink, box[:2], mask)
            return box
    return None


def legibility(ground: np.ndarray, ink: tuple[int, int, int]) -> float:
    """The contrast that the ink has with all but 5 % of the ground, uint8 [height, width, 3]; contrast ratio of WCAG 2."""
    one, other = luminance(ground), luminance(np.asarray(ink, np.uint8))
    ratio = (np.maximum(one, other) + 0.05) / (np.minimum(one, other) + 0.05)
    return float(np.percentile(ratio, 5))


def luminance(colours: np.ndarray) -> np.ndarray:
    """Relative luminance 0..1 of sRGB colours, uint8 [..., 3], as WCAG 2 defines it."""
    part = colours / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def turns_about(rng: np.random.Generator, texts: Sequence[str], boxes: Sequence[str]) -> tuple[Turn, ...]:
    """What it says, or, where several words stand apart, what is where."""
    if len(texts) == 1:
        task = "ocr_lines" if "\n" in texts[0] else "ocr_text"
        return (Turn(task, pick(rng, WORDINGS[task]), texts[0]),)
    turns = [Turn("ocr_at", pick(rng, WORDINGS["ocr_at"]).format(box=b), t) for t, b in zip(texts, boxes, strict=True)]
    turns += [Turn("ocr_where", pick(rng, WORDINGS["ocr_where"]).format(text=t), b) for t, b in zip(texts, boxes, strict=True)]
    return tuple(turns[i] for i in rng.permutation(len(turns))[:4].tolist())
