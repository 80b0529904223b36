"""ArrayRecord files of conversations with their pictures inside, read through Grain.

A record is a 4-byte little-endian length, that many bytes of JSON, then the encoded pictures one behind the other. The JSON is a
record as in conversation files, with `picture_bytes`, the list of the pictures' sizes, in place of `image` or `images`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
from array_record.python.array_record_module import ArrayRecordWriter

from andesvl_jax.data.conversations import inside_record, read_record
from andesvl_jax.data.pictures import decode_picture
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.chat import Message


class ArrayRecords(Sequence[list[Message]]):
    """The records of a file as conversations.

    Raises:
      UserError: on opening, a file that is no ArrayRecord or is empty; with an index, a record that cannot be learned from.
    """

    def __init__(self, path: str | Path, image_root: str | None = None):
        del image_root  # pictures are inside
        self._path = Path(path)
        try:
            if not self._path.is_file():
                raise OSError("no such file")
            self._records = grain.sources.ArrayRecordDataSource([str(path)])
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: cannot be read as an ArrayRecord file ({error}).") from error
        if len(self._records) == 0:
            raise UserError(f"{path}: found no record, expected at least one.")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> list[Message]:
        try:
            return unpack_record(self._records[index])
        except (UserError, OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{self._path}: record {index + 1}: {error}") from error


def pack_record(record: Mapping[str, Any], pictures: Sequence[bytes]) -> bytes:
    """The bytes of a record: a conversation without image fields, and its encoded pictures in the order of their marks."""
    head = json.dumps({**record, "picture_bytes": [len(picture) for picture in pictures]}).encode()
    return b"".join([len(head).to_bytes(4, "little"), head, *pictures])


def unpack_record(raw: bytes) -> list[Message]:
    """The inverse, as messages with decoded pictures. Raises UserError for lengths that do not add up or a bad conversation."""
    length = int.from_bytes(raw[:4], "little")
    if len(raw) < 4 or length > len(raw) - 4:
        raise UserError(f"says that its JSON has {length:,} bytes, expected at most the {max(len(raw) - 4, 0):,} that are there.")
    try:
        record = json.loads(raw[4 : 4 + length].decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"its JSON cannot be read ({error}).") from error
    sizes = record.pop("picture_bytes", []) if isinstance(record, dict) else []
    counts = isinstance(sizes, list) and all(type(size) is int and size >= 0 for size in sizes)
    rest = len(raw) - 4 - length
    if not counts or sum(sizes) != rest:
        raise UserError(f"picture_bytes is {str(sizes)[:80]}, expected whole numbers from 0 of {rest:,} bytes in all.")
    pictures, at = [], 4 + length
    for number, size in enumerate(sizes, start=1):
        pictures.append(decode_picture(raw[at : at + size], f"picture {number}"))
        at += size
    if isinstance(record, dict):
        record["images"] = pictures
    return read_record(record, inside_record)


def write_array_record(path: str | Path, records: Iterable[bytes]) -> None:
    """Writes records that `pack_record` made, each in a group of its own, so that any is read alone."""
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
