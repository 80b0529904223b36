"""Writes the items of a source: `train.tar` and `validation.tar` (WebDataset), `manifest.json` and a page with examples.

OUT/NAME/train.tar       000000.png + 000000.json, ...: read by `data.tar.TarShard`
OUT/NAME/manifest.json   packages, counts, what was left out; its presence says that the source is finished
"""

import base64
import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jinja2

from andesvl_jax.checkpoints.staging import replacing
from andesvl_jax.data.examples import SPLITS
from andesvl_jax.errors import UserError
from andesvl_jax.prepare.held_out import refuse
from andesvl_jax.prepare.items import Card, Item, LeftOut

MANIFEST = "manifest.json"
SHOWN = 36  # examples on the page
SHOW_EVERY = 97  # pictures of training from one example to the next that may be shown
MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg"}
PAGE = Path(__file__).with_name("card.html")


def write_source(card: Card, items: Iterable[Item | LeftOut], folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Writes one source to `folder`, which appears whole or not at all, and returns its manifest.

    Args:
      recipe: what made the items; kept in the manifest, so that another run knows whether it has to make them again.
    Raises:
      UserError: an item is held out, or its content or picture is in the other split too; `folder` is something else, or the
        disk refuses.
    """
    with replacing(folder, "source", (MANIFEST,)) as staging:
        tally = _Tally(card.name)
        with _Tars(staging) as tars:
            for item in items:
                tally.add(item)
                if isinstance(item, Item):
                    tars.add(item)
        if not tally.counts["train", "items"]:
            raise UserError(f"{card.name}: found nothing to train on, expected at least one item.")
        manifest = _manifest(card, tally, recipe)
        (staging / "card.html").write_text(_page(card, manifest, tally.shown), encoding="utf-8")
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


class _Tally:
    """Counts items and refuses those that must not be there."""

    def __init__(self, name: str):
        self._name = name
        self.counts: Counter[tuple[str, str]] = Counter()
        self.tasks: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.shown: list[Item] = []
        self._keys: set[str] = set()
        self._split: dict[bytes, str] = {}  # digest of a content or picture -> where it was seen
        self._questions: set[bytes] = set()
        self._left: set[LeftOut] = set()

    def add(self, item: Item | LeftOut) -> None:
        if isinstance(item, LeftOut):
            self.left_out[item.reason] += item not in self._left
            self._left.add(item)
            return
        self._check(item)
        self.counts[item.split, "items"] += 1
        for turn in item.turns:
            digest = _digest(item.picture + turn.question.encode())
            self.counts[item.split, "questions"] += 1
            self.counts[item.split, "distinct"] += digest not in self._questions
            self._questions.add(digest)
            self.tasks[turn.task] += item.split == "train"
        number = self.counts["train", "items"]
        if item.split == "train" and len(self.shown) < SHOWN and number % SHOW_EVERY == 1:
            self.shown.append(item)

    def _check(self, item: Item) -> None:
        for key in item.keys:
            if key not in self._keys:
                refuse(key, self._name)
                self._keys.add(key)
        if not item.turns or not item.keys or item.split not in SPLITS:
            raise ValueError(f"{self._name}: item {item.content!r} has no turn, no key or split {item.split!r}")
        for what, data in (("content", item.content.encode()), ("picture", item.picture)):
            if self._split.setdefault(_digest(what.encode() + data), item.split) != item.split:
                raise UserError(f"{self._name}: the {what} of {item.content[:80]!r} is in both splits, expected it in one.")


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]


class _Tars:
    """The tars of the splits, opened at their first items. Equal items give equal files."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[str, tarfile.TarFile] = {}
        self._written: Counter[str] = Counter()

    def __enter__(self) -> "_Tars":
        return self

    def __exit__(self, *error) -> None:
        for tar in self._open.values():
            tar.close()

    def add(self, item: Item) -> None:
        if item.split not in self._open:
            self._open[item.split] = tarfile.open(self._folder / f"{item.split}.tar", "w", format=tarfile.PAX_FORMAT)
        stem = f"{self._written[item.split]:07d}"
        self._written[item.split] += 1
        for ending, data in ((_ending(item.picture), item.picture), ("json", _record(item))):
            info = tarfile.TarInfo(f"{stem}.{ending}")
            info.size = len(data)
            self._open[item.split].addfile(info, io.BytesIO(data))


def _ending(picture: bytes) -> str:
    for magic, ending in MAGIC.items():
        if picture.startswith(magic):
            return ending
    raise ValueError("a picture is neither PNG nor JPEG")


def _record(item: Item) -> bytes:
    messages: list[dict[str, Any]] = []
    for turn in item.turns:
        question = [{"type": "image"}] * (not messages) + [{"type": "text", "text": turn.question}]
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": turn.answer}]
    record = {"messages": messages, "tasks": [turn.task for turn in item.turns], "content": item.content, "keys": item.keys}
    return json.dumps(record, ensure_ascii=False).encode()


def _manifest(card: Card, tally: _Tally, recipe: dict[str, Any]) -> dict[str, Any]:
    packages = [
        {"kind": p.kind, "name": p.name, "version": p.version, "bytes": p.size, "sha256": p.sha256, "licence": p.licence}
        for p in card.packages
    ]
    splits = {split: {what: tally.counts[split, what] for what in ("items", "questions", "distinct")} for split in SPLITS}
    return {
        "name": card.name, "summary": card.summary, "licence": card.licence, "packages": packages, **splits,
        "tasks": dict(sorted(tally.tasks.items())), "held_out": card.held_out, "left_out": dict(sorted(tally.left_out.items())),
        "recipe": recipe,
    }  # fmt: skip


def _page(card: Card, manifest: dict[str, Any], shown: list[Item]) -> str:
    pictures = [(base64.b64encode(item.picture).decode(), _ending(item.picture), item.turns) for item in shown]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(PAGE.read_text(encoding="utf-8")).render(card=card, manifest=manifest, pictures=pictures)


def finished(folder: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a source that the same recipe has written to `folder` already, else None."""
    manifest = _read_manifest(folder)
    return manifest if manifest is not None and manifest.get("recipe") == recipe else None


def manifests(out: Path) -> Iterator[dict[str, Any]]:
    """The manifests of all finished sources below `out`, in the order of their names."""
    for path in sorted(out.glob(f"*/{MANIFEST}")):
        staged = path.parent.name.startswith(".")  # by a run that was killed
        if not staged and (manifest := _read_manifest(path.parent)) is not None:
            yield manifest


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "name" in manifest else None
