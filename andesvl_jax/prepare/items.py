"""What a source of real pictures is: a module with `CARD` and `make(cache, seed, side)`, which yields items.

    CARD: Card
    def make(cache: Path, seed: int, side: int) -> Iterator[Item | LeftOut]

`cache` is the folder of downloaded packages, `side` the largest side of a picture in pixels. Equal arguments give equal items.
"""

import io
from dataclasses import dataclass

from PIL import Image

from andesvl_jax.data.examples import SPLITS, Turn, in_validation
from andesvl_jax.prepare.packages import Package

SIDE = 139  # pixels: five visual tokens of `nano`, see `data.drawing.side`


@dataclass(frozen=True)
class Card:
    """What is said of a source before anything is fetched."""

    name: str
    summary: str  # one sentence
    packages: tuple[Package, ...]
    held_out: str  # one sentence: what is left out for evaluation
    questions: int  # for training, about, with the default arguments

    @property
    def licence(self) -> str:
        """Licences of the packages, each once."""
        return ", ".join(dict.fromkeys(package.licence for package in self.packages))

    @property
    def download(self) -> int:
        """Bytes."""
        return sum(package.size for package in self.packages)


@dataclass(frozen=True)
class Item:
    """One picture and the turns about it.

    `content` is the canonical description of what it shows, by which `split` is decided. `keys` name what is in it (every emoji,
    caption, language, ...) as `held_out.is_held_out` takes them: the writer refuses an item of which one is held out.
    """

    picture: bytes  # PNG or JPEG
    turns: tuple[Turn, ...]
    content: str
    split: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class LeftOut:
    """A part of a package that a source leaves out, counted in its manifest."""

    key: str
    reason: str  # a few words, the same for all of a kind


def split_of(content: str) -> str:
    """One of SPLITS, from nothing but the content."""
    return SPLITS[in_validation(content)]


def png(image: Image.Image) -> bytes:
    """The picture as PNG."""
    out = io.BytesIO()
    image.save(out, "PNG", optimize=False)
    return out.getvalue()


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """The picture as JPEG without colour subsampling, which would blur small text."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, subsampling=0)
    return out.getvalue()
