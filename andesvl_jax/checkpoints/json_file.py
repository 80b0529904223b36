"""JSON files of bounded size."""

import json
from pathlib import Path
from typing import Any

from andesvl_jax.errors import UserError

MAX_JSON_BYTES = 16 << 20  # a config is kilobytes; the index of a 4B checkpoint is under one megabyte


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError when the file is missing or too large, names a key twice or holds something else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}.")
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a JSON file.") from error
    return parse_json(text, str(path))


def parse_json(text: bytes, source: str) -> dict[str, Any]:
    """A JSON object in UTF-8; `source` names it in errors. Raises UserError as `read_json` does."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise UserError(f"{source}: the key {twice[:200]!r} is there twice, expected once.")
        return found

    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{source}: not valid JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise UserError(f"{source}: holds a {type(raw).__name__}, expected a JSON object.")
    return raw


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
