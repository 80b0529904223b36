"""`andesvl prepare real`: real pictures with questions, made of published packages, minus what is held out.

A further source is a further module in SOURCES. Each is written by itself and found finished by the next run, so that an
interrupted run goes on where it was.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from andesvl_jax.errors import UserError
from andesvl_jax.prepare import emoji, flags, gui_pages, help_pages, icons, maps, ocr_words, stamps, table_charts
from andesvl_jax.prepare.items import SIDE, Card
from andesvl_jax.prepare.packages import CACHE, fetch
from andesvl_jax.prepare.writer import finished, manifests, write_source

MODULES = (emoji, icons, flags, stamps, maps, gui_pages, ocr_words, table_charts, help_pages)
SOURCES: dict[str, ModuleType] = {module.CARD.name: module for module in MODULES}


def prepare_real(
    out: str | Path, only: Sequence[str] | None = None, cache: Path = CACHE, seed: int = 0, side: int = SIDE
) -> dict[str, Any]:
    """Writes the sources (`only` those that are named) below `out` and returns what stands in `out/manifest.json`.

    Args:
      side: largest side of a picture in pixels.
    Raises:
      UserError: a source that is not known; a package that cannot be had; as `writer.write_source` does.
    """
    out = Path(out)
    if unknown := [name for name in only or () if name not in SOURCES]:
        raise UserError(f"--only: found {unknown[0]!r}, expected one of {', '.join(SOURCES)}.")
    for name in only or SOURCES:
        _prepare_source(SOURCES[name], out / name, cache, seed, side)
    whole = {"sources": {manifest["name"]: manifest for manifest in manifests(out)}}
    (out / "manifest.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return whole


def _prepare_source(module: ModuleType, folder: Path, cache: Path, seed: int, side: int) -> None:
    card: Card = module.CARD
    recipe = _recipe(module, seed, side)
    manifest = finished(folder, recipe)
    if manifest is None:
        for package in card.packages:
            fetch(package, cache)
        items = tqdm(module.make(cache, seed, side), desc=card.name, unit=" pictures", disable=None)
        manifest = write_source(card, items, folder, recipe)
    train, validation = manifest["train"], manifest["validation"]
    print(f"{folder}: {train['distinct']:,} questions to train on, {validation['distinct']:,} for validation; {card.licence}")


def _recipe(module: ModuleType, seed: int, side: int) -> dict[str, Any]:
    """What decides the items of a source: its packages, its code and the arguments."""
    packages = [package.sha256 for package in module.CARD.packages]
    return {"code": _code(), "packages": packages, "seed": seed, "side": side}


def _code() -> str:
    """Digest of everything beside this file: which of it draws for a source is not told apart."""
    files = sorted(file for file in Path(__file__).parent.iterdir() if file.suffix in (".py", ".js"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def listing() -> list[dict[str, Any]]:
    """What can be prepared: name, summary, licence, bytes to download and questions to train on, per source."""
    return [
        {
            "name": card.name,
            "summary": card.summary,
            "licence": card.licence,
            "download": card.download,
            "questions": card.questions,
        }
        for card in (module.CARD for module in SOURCES.values())
    ]
