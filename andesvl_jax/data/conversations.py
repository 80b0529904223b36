"""Conversation files as training data: LLaVA-style JSON, and ShareGPT- or ChatML-style JSONL.

A file is a JSON array or one JSON object per line, told apart by its first character. A record holds its turns as
`conversations: [{"from", "value"}]` or `messages: [{"role", "content"}]`, and its pictures as `image` or `images`, one path or
a list, for the `<image>` marks in its user turns. Files are hostile: nothing is downloaded, no path leaves the image folder.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from andesvl_jax.errors import UserError
from andesvl_jax.inputs.chat import IMAGE_MARK, Message

MAX_LINE_BYTES = 16 << 20  # of one JSONL record, which is read alone
MAX_ARRAY_BYTES = 2 << 30  # of a JSON array, which is parsed whole; LLaVA's mix of 665,000 records has 1 GB
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip
LAYOUTS = {"conversations": ("from", "value"), "messages": ("role", "content")}
UNSUPPORTED = ("video", "videos", "audio", "audios", "tools", "rejected")  # a record that needs one of these must not pass


class Conversations(Sequence[list[Message]]):
    """The records of a file as messages, pictures as paths: a random-access source for `grain.MapDataset.source`.

    Args:
      path: the file. image_root: folder that its picture paths start from and stay inside; None: the file's own.
    Raises:
      UserError: no such file, or one that is broken or without a record; with an index, a record that cannot be learned from,
        of which the file, the number counted from 1 and the field are named.
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None):
        self._path = Path(path)
        root = self._path.parent if image_root is None else Path(image_root)
        if not root.is_dir():
            raise UserError(f"{root}: no such image folder.")
        self._root = root.resolve()
        self._records = _open(self._path)
        if len(self._records) == 0:
            raise UserError(f"{path}: found no record, expected at least one.")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> list[Message]:
        record = self._records[index]
        try:
            return read_record(record, lambda value, field: _inside(value, field, self._root))
        except UserError as error:
            raise UserError(f"{self._path}: record {index + 1}: {error}") from error


Find = Callable[[Any, str], Any]  # (what a record says of a picture, the field it stands in) -> the picture; raises UserError


def read_record(record: Any, find: Find) -> list[Message]:
    """One record as messages for `render_training`: content lists, so that only the marks of user turns are places of pictures.

    Args:
      record: the parsed JSON object. find: gives its pictures.
    Raises:
      UserError: a missing, unknown or malformed field; marks that are not as many as pictures; a picture that `find` refuses;
        no answer to learn.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"found a {type(record).__name__}, expected an object.")
    field = next((name for name in UNSUPPORTED if record.get(name)), None)
    if field is not None:
        raise UserError(f"{field} is given, which this model has no input for.")
    layouts = [name for name in LAYOUTS if name in record]
    if len(layouts) != 1:
        raise UserError(f"has {' and '.join(layouts) or 'no turns'}, expected one of {' or '.join(LAYOUTS)}.")
    turns = record[layouts[0]]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{layouts[0]} is {_shown(turns)}, expected a list of at least one turn.")
    pictures = iter(_pictures(record, find))
    messages: list[Message] = []
    if record.get("system"):
        messages.append({"role": "system", "content": _text(record["system"], "system")})
    for number, turn in enumerate(turns, start=1):
        messages.append(_message(turn, f"{layouts[0]}[{number}]", *LAYOUTS[layouts[0]], pictures, find))
    if unplaced := len(list(pictures)):
        raise UserError(f"pictures without an {IMAGE_MARK} mark in a user turn: {unplaced}, expected one mark for each picture.")
    if not any(message["role"] == "assistant" and _has_text(message) for message in messages):
        raise UserError(f"{layouts[0]} has no answer of the assistant, expected at least one to learn from.")
    return messages


def inside_record(picture: Any, field: str) -> Image.Image:
    """The `find` of sources whose pictures stand in the record itself: decoded ones pass, names of other places do not."""
    if not isinstance(picture, Image.Image):
        raise UserError(f"{field} is {_shown(picture)}, expected only the pictures of the record itself, in their order.")
    return picture


def _message(turn: Any, where: str, role_key: str, content_key: str, pictures: Iterator[Any], find: Find) -> Message:
    if not isinstance(turn, Mapping):
        raise UserError(f"{where} is {_shown(turn)}, expected an object with {role_key} and {content_key}.")
    name, content = turn.get(role_key), turn.get(content_key)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"{where}.{role_key} is {_shown(name)}, expected one of {', '.join(ROLES)}.")
    where = f"{where}.{content_key}"
    if isinstance(content, str):
        return {"role": role, "content": _placed(content, where, pictures) if role == "user" else _text(content, where)}
    if not isinstance(content, list):
        raise UserError(f"{where} is {_shown(content)}, expected a string or a list of items.")
    items: list[Mapping[str, Any]] = []
    for item in content:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "text":
            items += _text(item.get("text"), where)
        elif kind in ("image", "image_url") and role == "user":
            items.append({"type": "image", "image": _picture_of(item, where, pictures, find)})
        else:
            raise UserError(f"{where} has an item of type {_shown(kind)}, expected text, or image or image_url in a user turn.")
    return {"role": role, "content": items}


def _placed(content: str, where: str, pictures: Iterator[Any]) -> list[Mapping[str, Any]]:
    """A user's string with the record's next pictures at its marks."""
    first, *others = content.split(IMAGE_MARK)
    items = _text(first, where)
    for text in others:
        picture = next(pictures, None)
        if picture is None:
            raise UserError(f"{where} has more {IMAGE_MARK} marks than the record has pictures, expected one picture for each.")
        items += [{"type": "image", "image": picture}, *_text(text, where)]
    return items


def _picture_of(item: Mapping[str, Any], where: str, pictures: Iterator[Any], find: Find) -> Any:
    """The picture of a content item: its own path, or the record's next picture where it names none."""
    value = item.get(item["type"])
    if isinstance(value, Mapping):
        value = value.get("url")
    if value is not None:
        return find(value, where)
    picture = next(pictures, None)
    if picture is None:
        raise UserError(f"{where} has an item of type {item['type']} without a path, and the record has no further picture.")
    return picture


def _pictures(record: Mapping[str, Any], find: Find) -> list[Any]:
    fields = [name for name in ("image", "images") if record.get(name) is not None]
    if len(fields) > 1:
        raise UserError("has image and images, expected one of them.")
    if not fields:
        return []
    value = record[fields[0]]
    return [find(path, fields[0]) for path in (value if isinstance(value, list) else [value])]


def _inside(value: Any, field: str, root: Path) -> Path:
    if not isinstance(value, str) or not value or "://" in value or value.startswith("data:"):
        raise UserError(f"{field} is {_shown(value)}, expected the path of a picture; nothing is downloaded.")
    try:
        path = (root / value).resolve()
        found = path.is_relative_to(root) and path.is_file()
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL byte, links in a circle
        found = False
    if found:
        return path
    raise UserError(f"{field} is {_shown(value)}, expected a file inside {root}.")


def _text(value: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, str):
        raise UserError(f"{where} is {_shown(value)}, expected a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has lone surrogates, expected valid Unicode.") from error
    return [{"type": "text", "text": value}] if value else []


def _has_text(message: Message) -> bool:
    return any(item["text"].strip() for item in message["content"] if item["type"] == "text")


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, (list, Mapping)) else repr(value)[:80]


class _Lines(Sequence[Any]):
    """The records of a JSONL file, each read when it is asked for; blank lines are left out."""

    def __init__(self, path: Path):
        self._path = path
        starts, ends, place = [], [], 0
        with open(path, "rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                if len(line) > MAX_LINE_BYTES:
                    raise UserError(f"{path}: record {len(starts) + 1}: has more than {MAX_LINE_BYTES:,} bytes, expected fewer.")
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    starts.append(place)
                    ends.append(place + len(line))
                place += len(line)
        self._starts, self._ends = np.array(starts, np.int64), np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        start, end = int(self._starts[index]), int(self._ends[index])
        with open(self._path, "rb") as file:
            file.seek(start)
            return _parse(file.read(end - start), f"{self._path}: record {index + 1}")


def _open(path: Path) -> Sequence[Any]:
    try:
        with open(path, "rb") as file:
            head = file.read(4096).lstrip(b" \t\r\n\xef\xbb\xbf")
        if not head.startswith(b"["):
            return _Lines(path)
        size = path.stat().st_size
        if size > MAX_ARRAY_BYTES:
            raise UserError(f"{path}: has {size:,} bytes, expected at most {MAX_ARRAY_BYTES:,} in a JSON array; write JSONL.")
        return _parse(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a conversation file.") from error


def _parse(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from error
