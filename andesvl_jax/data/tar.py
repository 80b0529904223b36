"""WebDataset shards: an uncompressed tar whose members with the same name up to the first dot of the file name are one sample.

A sample is pictures with `.json`, a record as in conversation files whose pictures are those members in order of their names, or
with `.txt`, a caption. Nothing is unpacked: names only group members, and members that are no regular files (links, devices,
sparse files) are left out.
"""

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from andesvl_jax.data.conversations import inside_record, read_record
from andesvl_jax.data.pictures import MAX_PICTURE_BYTES, decode_picture
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.chat import Message

PICTURES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm")
MAX_TEXT_BYTES = 16 << 20  # of a .json or .txt member
MAX_HEADER_BYTES = 1 << 20  # of an extended header
DESCRIBE = "Describe this picture."

Span = tuple[int, int]  # first byte and number of bytes


class TarShard(Sequence[list[Message]]):
    """The samples of a tar as conversations, in the order in which their first members stand in it.

    Raises:
      UserError: on opening, a file that is no whole tar or holds no sample, or a member twice; with an index, a sample that has
        no text, or text or pictures that nothing can be learned from.
    """

    def __init__(self, path: str | Path, image_root: str | None = None):
        del image_root  # pictures are inside
        self._path = Path(path)
        samples: dict[str, dict[str, Span]] = {}
        for name, span in _members(self._path):
            folder, _, file = name.rpartition("/")
            stem, _, ending = file.partition(".")
            members, ending = samples.setdefault(f"{folder}/{stem}", {}), ending.lower()
            if ending in members:
                raise UserError(f"{path}: has member {name[:80]!r} twice, expected it once.")
            members[ending] = span
        self._samples = list(samples.items())
        if not self._samples:
            raise UserError(f"{path}: found no file in it, expected pictures with .json or .txt.")

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> list[Message]:
        name, members = self._samples[index]
        try:
            return self._conversation(members)
        except UserError as error:
            raise UserError(f"{self._path}: sample {index + 1} ({name[:80]}): {error}") from error

    def record(self, index: int) -> dict[str, Any]:
        """The `.json` member as it is, {} where there is none or it holds something else; no picture is decoded."""
        members = self._samples[index][1]
        text = self._read(members["json"], MAX_TEXT_BYTES, ".json") if "json" in members else b"{}"
        try:
            found = json.loads(text.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _conversation(self, members: dict[str, Span]) -> list[Message]:
        texts = [ending for ending in ("json", "txt") if ending in members]
        if len(texts) != 1:
            raise UserError(f"has {' and '.join(texts) or 'neither .json nor .txt'}, expected one of .json or .txt.")
        text = self._read(members[texts[0]], MAX_TEXT_BYTES, f".{texts[0]}")
        endings = sorted(ending for ending in members if ending.rpartition(".")[2] in PICTURES)
        pictures = [decode_picture(self._read(members[e], MAX_PICTURE_BYTES, f".{e}"), f".{e}") for e in endings]
        try:
            decoded = text.decode("utf-8-sig")
            record = json.loads(decoded) if texts == ["json"] else _caption(decoded, len(pictures))
        except (ValueError, RecursionError) as error:
            raise UserError(f".{texts[0]} cannot be read ({error}).") from error
        if isinstance(record, dict):
            record = {key: value for key, value in record.items() if key != "image"} | {"images": pictures}
        return read_record(record, inside_record)

    def _read(self, span: Span, most: int, name: str) -> bytes:
        start, size = span
        if size > most:
            raise UserError(f"{name} has {size:,} bytes, expected at most {most:,}.")
        with open(self._path, "rb") as file:
            file.seek(start)
            return file.read(size)


def _caption(text: str, pictures: int) -> dict[str, Any]:
    question = [*[{"type": "image"}] * pictures, {"type": "text", "text": DESCRIBE}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text.strip()}]}


def _members(path: Path) -> list[tuple[str, Span]]:
    """Name and place of every regular file, from the headers alone; each is checked to lie inside the tar."""
    found = []
    try:
        whole = path.stat().st_size
        with open(path, "rb") as file, tarfile.open(fileobj=_Bounded(file), mode="r:") as tar:
            while (member := tar.next()) is not None:
                start, size = member.offset_data, member.size
                if size < 0 or start < 0 or start + size > whole:
                    raise UserError(
                        f"{path}: member {member.name[:80]!r} says that it has {size:,} bytes from byte {start:,}, expected it "
                        f"inside the {whole:,} bytes of the file."
                    )
                if member.isreg() and not member.issparse():
                    found.append((member.name, (start, size)))
                tar.members.clear()  # tarfile would keep every header
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: cannot be read as an uncompressed tar ({error}).") from error
    return found


class _Bounded:
    """An open file that refuses to read more at once than a header may have, before any memory is taken."""

    def __init__(self, file: BinaryIO):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header has {size:,} bytes, expected at most {MAX_HEADER_BYTES:,}")
        return self._file.read(size)
