"""Labels of screenshots as an OCR engine reads them, parts of the screenshots that cut none, and questions about them.

The engine is RapidOCR with the PP-OCRv6 models inside its wheel; nothing is downloaded. Its answers are pseudo-labels. Relied on
is only what it is sure of, is plain text and is made of words that the manual uses: an independent check that catches most of the
letters which an underlined access key turns into others ("Eoreground").
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from PIL import Image

from andesvl_jax.data.drawing import Box, box_text
from andesvl_jax.data.examples import Turn, pick
from andesvl_jax.errors import UserError

ENGINE, ENGINE_VERSION = "rapidocr", "3.10.0"  # another version reads otherwise
MODELS = {"Det.model_path": "PP-OCRv6_det_small.onnx", "Rec.model_path": "PP-OCRv6_rec_small.onnx"}
LEAST_CONFIDENCE = 0.98  # of the engine, 0..1
PLAIN = re.compile(r"[\w(][ -;=?-~]{0,38}[\w).:?%!]", re.ASCII)  # printable ASCII without angle brackets
SLANT = 3  # pixels between the ends of an upright label's edge, at most
EM = 0.7  # of the height of a label's box
SMALLEST_TEXT = 9  # pixels per em in a view
SMALLEST_ZOOM = 0.7
MARGIN = 3  # pixels around a label in a part of a screenshot
VIEWS = 4  # parts of one screenshot
TRIES = 12
MOST_LISTED = 8  # labels of an answer that lists them
QUESTIONS = 4

WORDINGS = {
    "help_label": (
        "What does the label at {box} say?",
        "Read the text in {box}.",
        "Which words stand at {box}?",
        "What is written in {box}?",
        "Give the text at {box}.",
        "请读出{box}处的文字。",
    ),
    "help_where": (
        "Give the box of <|object_ref_start|>{text}<|object_ref_end|>.",
        "Locate {text}.",
        "Where does it say {text}?",
        "Find the label {text}.",
        "In which box is {text} written?",
    ),
    "help_labels": (
        "Which texts can be read?",
        "List the texts from top to bottom.",
        "Read everything, one label to a line.",
        "Write down all labels that you see.",
        "What is written here? Give each label its own line.",
        "请逐行列出图中的所有文字。",
    ),
}


@dataclass(frozen=True)
class Label:
    """Something that looks like text in a picture, its box in pixels, and whether the text can be relied on."""

    text: str
    box: Box
    sure: bool


Reader = Callable[[Image.Image], list[Label]]


@dataclass(frozen=True)
class View:
    """A picture and everything in it that looks like text, none of it cut."""

    picture: Image.Image
    labels: tuple[Label, ...]


def open_reader() -> Reader:
    """A function that finds everything like text in an RGB picture; sure is what stands upright and has enough confidence.

    Raises:
      UserError: the engine is missing, or it is another version than that by which the labels were judged.
    """
    try:
        found = version(ENGINE)
        import onnxruntime  # noqa: F401  the engine finds out later that it is missing
        import rapidocr
        from rapidocr import RapidOCR
    except (ImportError, PackageNotFoundError) as error:
        raise UserError(f"help: labels are read by {ENGINE} (and onnxruntime); install `andesvl-jax[real]`.") from error
    if found != ENGINE_VERSION:
        raise UserError(f"help: found {ENGINE} {found}, expected {ENGINE_VERSION}; install `andesvl-jax[real]`.")
    models = Path(rapidocr.__file__).parent / "models"
    one_thread = dict.fromkeys(("intra_op_num_threads", "inter_op_num_threads"), 1)  # equal pictures are read equally
    settings = {f"EngineConfig.onnxruntime.{name}": value for name, value in one_thread.items()}
    # models by their path, so that none is ever downloaded; labels of low confidence too, for they must not be cut
    settings |= {name: str(models / file) for name, file in MODELS.items()}
    settings |= {"Global.text_score": 0.0, "Global.use_cls": False, "Global.log_level": "error"}
    engine = RapidOCR(params=settings)
    return lambda picture: labels_of(engine(np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])), picture.size)


def labels_of(found, size: tuple[int, int]) -> list[Label]:
    """Labels out of RapidOCR's output for a picture of `size` (width, height).

    Args:
      found: has `boxes` [N, 4, 2], corners clockwise from top left in pixels, `txts` and `scores`; None where there is no text.
    """
    if found.boxes is None or found.txts is None:
        return []
    labels = []
    for corners, text, score in zip(np.asarray(found.boxes, float), found.txts, found.scores, strict=True):
        edges = np.clip([*np.floor(corners.min(0)), *np.ceil(corners.max(0))], 0, [*size, *size])
        x1, y1, x2, y2 = (int(edge) for edge in edges)
        upright = np.abs(corners[0, 1] - corners[1, 1]) <= SLANT and np.abs(corners[0, 0] - corners[3, 0]) <= SLANT
        if x1 < x2 and y1 < y2:
            labels.append(Label(text.strip(), (x1, y1, x2, y2), bool(upright and score >= LEAST_CONFIDENCE)))
    return labels


def checked(labels: Iterable[Label], vocabulary: Set[str]) -> list[Label]:
    """The same labels, sure only if they are plausible too."""
    return [replace(label, sure=label.sure and is_plausible(label.text, vocabulary)) for label in labels]


def is_plausible(text: str, vocabulary: Set[str]) -> bool:
    """Whether a text is plain and its words are in the vocabulary (lower case); one letter beside words is more often an icon."""
    words = re.findall("[A-Za-z]+", text)
    return PLAIN.fullmatch(text) is not None and all(
        word.lower() in vocabulary and (len(word) > 1 or len(words) == 1 or word in ("a", "A", "I")) for word in words
    )


def views(rng: np.random.Generator, picture: Image.Image, labels: Sequence[Label], side: int) -> Iterator[View]:
    """The whole picture in `side` pixels, and parts of it, as they are or shrunk, where a sure label stays legible."""
    scale = min(1.0, side / max(picture.size))
    whole = _part(picture, labels, (0, 0, *picture.size), scale)
    if any(label.sure for label in whole.labels):
        yield whole
    taken: list[Box] = []
    for _ in range(TRIES if scale < 1 and any(label.sure for label in labels) else 0):
        zoom = 1.0 if rng.random() < 0.5 else rng.uniform(SMALLEST_ZOOM, 1)
        area = draw_area(rng, picture.size, labels, int(side / zoom))
        if area is None or len(taken) == VIEWS or any(_overlap(area, other) >= 0.5 for other in taken):
            continue
        part = _part(picture, labels, area, zoom)
        if any(label.sure for label in part.labels):
            taken.append(area)
            yield part


def draw_area(rng: np.random.Generator, size: tuple[int, int], labels: Sequence[Label], most: int) -> Box | None:
    """A part of a picture, at most `most` pixels a side, around a sure label and such others as fit; it cuts none of them.

    None where the label alone is too long.
    """
    boxes = [label.box for label in labels]
    first = pick(rng, [label.box for label in labels if label.sure])
    area = _uncut(_padded(first, size), boxes)
    if not _fits(area, most):
        return None
    for box in sorted(boxes, key=lambda box: _distance(first, box)):
        larger = _uncut(_union(area, _padded(box, size)), boxes)
        area = larger if _fits(larger, most) else area
    for _ in range(TRIES):  # some air around, for a part that is all text looks like no screen
        around = _widened(rng, area, size, most)
        if not any(_cuts(around, box) for box in boxes):
            return around
    return area


def _padded(box: Box, size: tuple[int, int]) -> Box:
    return max(0, box[0] - MARGIN), max(0, box[1] - MARGIN), min(size[0], box[2] + MARGIN), min(size[1], box[3] + MARGIN)


def _uncut(area: Box, boxes: Sequence[Box]) -> Box:
    """The area, made as large as it takes to cut no box."""
    while cut := [box for box in boxes if _cuts(area, box)]:
        for box in cut:
            area = _union(area, box)
    return area


def _cuts(area: Box, box: Box) -> bool:
    apart = box[2] <= area[0] or area[2] <= box[0] or box[3] <= area[1] or area[3] <= box[1]
    return not apart and _union(area, box) != area


def _union(one: Box, other: Box) -> Box:
    return min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]), max(one[3], other[3])


def _fits(area: Box, most: int) -> bool:
    return max(area[2] - area[0], area[3] - area[1]) <= most


def _distance(one: Box, other: Box) -> int:
    across, down = max(one[0], other[0]) - min(one[2], other[2]), max(one[1], other[1]) - min(one[3], other[3])
    return max(across, 0) + max(down, 0)


def _widened(rng: np.random.Generator, area: Box, size: tuple[int, int], most: int) -> Box:
    """A random area around this one, inside the picture."""
    spans = []
    for low, high, edge in ((area[0], area[2], size[0]), (area[1], area[3], size[1])):
        length = int(rng.integers(high - low, min(most, edge) + 1))
        start = int(rng.integers(max(0, high - length), min(low, edge - length) + 1))
        spans.append((start, start + length))
    (x1, x2), (y1, y2) = spans
    return x1, y1, x2, y2


def _overlap(one: Box, other: Box) -> float:
    """Shared area as a share of the smaller one."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])  # noqa: E731
    return max(0, width) * max(0, height) / min(area(one), area(other))


def _part(picture: Image.Image, labels: Sequence[Label], area: Box, scale: float) -> View:
    """An area that cuts no label, scaled; labels that become too small are not sure."""
    size = tuple(max(1, round((area[i + 2] - area[i]) * scale)) for i in (0, 1))
    part = picture.crop(area)
    inside = []
    for label in labels:
        if _union(area, label.box) == area:
            x1, y1, x2, y2 = (round((edge - area[i % 2]) * scale) for i, edge in enumerate(label.box))
            legible = (label.box[3] - label.box[1]) * EM * scale >= SMALLEST_TEXT
            inside.append(Label(label.text, (x1, y1, x2, y2), label.sure and legible))
    return View(part if size == part.size else part.resize(size, Image.Resampling.LANCZOS), tuple(inside))


def turns_about(rng: np.random.Generator, view: View, listed: Sequence[Label], asked: Sequence[Label]) -> tuple[Turn, ...]:
    """Up to QUESTIONS questions about a view, none where no label may be asked about.

    Args:
      listed: labels that an answer may contain. asked: those of them that may be asked about one by one.
    """
    order = [asked[i] for i in rng.permutation(len(asked)).tolist()]
    box = lambda label: box_text(label.box, *view.picture.size)  # noqa: E731
    turns = [_turn(rng, "help_label", label.text, box=box(label)) for label in order[:2]]
    lonely = [label for label in order if is_lonely(label, view.labels)]
    turns += [_turn(rng, "help_where", box(label), text=label.text) for label in lonely[-2:]]
    if asked and len(listed) == len(view.labels) <= MOST_LISTED:
        turns.append(_turn(rng, "help_labels", "\n".join(label.text for label in in_reading_order(listed))))
    return tuple(turns[i] for i in rng.permutation(len(turns))[:QUESTIONS].tolist())


def is_lonely(label: Label, labels: Sequence[Label]) -> bool:
    """Whether no other label holds the same text, whatever its case and spaces."""
    bare = lambda text: "".join(text.lower().split())  # noqa: E731
    return not any(bare(label.text) in bare(other.text) for other in labels if other is not label)


def in_reading_order(labels: Sequence[Label]) -> list[Label]:
    """Row by row from the top, each from the left; a label is of a row if its middle is beside the row's first label."""
    rows: list[list[Label]] = []
    for label in sorted(labels, key=lambda label: (label.box[1], label.box[0])):
        middle = (label.box[1] + label.box[3]) / 2
        if rows and middle < rows[-1][0].box[3]:
            rows[-1].append(label)
        else:
            rows.append([label])
    return [label for row in rows for label in sorted(row, key=lambda label: label.box[0])]


def _turn(rng: np.random.Generator, task: str, answer: str, **parts: str) -> Turn:
    return Turn(task, pick(rng, WORDINGS[task]).format(**parts), answer)
