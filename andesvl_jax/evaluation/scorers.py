"""Was an answer right? One rule per task, and the interval of an accuracy.

Sources: answer format and centre rule of the AndesVL evaluation (0-1000 boxes, centre of the predicted box inside the true one);
the rule of RULER's string_match_all for its tasks, here on whole words.
"""

import re

Box = tuple[int, int, int, int]
_BOX = re.compile(r"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)")
BOX_TASKS = (
    "box",
    "emoji_place_box",
    "flag_place_box",
    "icon_place_box",
    "stamp_place_box",
    "map_box",
    "ocr_where",
)  # objects: intersection over union at least one half
CENTRE_TASKS = ("grounding", "screen_qa", "page_grounding")  # widgets: a tap on the centre of the predicted box hits
FOUND_TASKS = ("niah_single", "niah_multikey", "niah_multivalue", "vt", "cwe", "fwe", "qa_two_hop")
FACT_TASKS = ("dialogue",)


def score(task: str, predicted: str, truth: str) -> float:
    """0..1: the share of what was asked for that stands in the answer (RULER's tasks), `fact_score` (summaries), or `correct`."""
    if task in FOUND_TASKS:
        words = truth.split(", ")
        return sum(re.search(rf"\b{re.escape(word)}\b", predicted, re.IGNORECASE) is not None for word in words) / len(words)
    return fact_score(predicted, truth) if task in FACT_TASKS else float(correct(task, predicted, truth))


def fact_score(predicted: str, truth: str) -> float:
    """Facts in both lists over those in the longer one: neither a missing fact nor an invented one is free."""
    found, expected = (
        {" ".join(fact.split()).casefold() for fact in re.split(r"[;\n]", text) if fact.strip()} for text in (predicted, truth)
    )
    return len(found & expected) / max(len(found), len(expected))


def correct(task: str, predicted: str, truth: str) -> bool:
    """Text answers match but for case and white space; boxes by IoU >= 0.5 or by their centre."""
    if task in BOX_TASKS or task in CENTRE_TASKS:
        guess, target = parse_box(predicted), parse_box(truth)
        if guess is None or target is None:
            return False
        return iou(guess, target) >= 0.5 if task in BOX_TASKS else inside(centre(guess), target)
    return " ".join(predicted.split()).casefold() == " ".join(truth.split()).casefold()


def parse_box(text: str) -> Box | None:
    """The first "(x1,y1),(x2,y2)" in a text, or None."""
    match = _BOX.search(text)
    return None if match is None else tuple(int(g) for g in match.groups())


def centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def inside(point: tuple[float, float], box: Box) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def iou(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    area = lambda box: max(box[2] - box[0], 0) * max(box[3] - box[1], 0)  # noqa: E731
    union = area(a) + area(b) - overlap
    return overlap / union if union else 0.0


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson score interval of an accuracy hits / n; (0, 1) of nothing."""
    if n == 0:
        return 0.0, 1.0
    p, zz = hits / n, z * z
    middle = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * (p * (1 - p) / n + zz / (4 * n * n)) ** 0.5
    return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))  # rounding may not push p out
