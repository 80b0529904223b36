"""Question tables as VLMEvalKit keeps them: tab-separated, one question a row, its picture as base64 in the row.

Columns: index (unique), image, question, answer; optionally hint and the options A, B, C, ... of a multiple choice. An image cell
may hold the index of the row that has the same picture, or a list of several pictures as `['...', '...']`.
"""

import csv
import io
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from andesvl_jax.data.pictures import decode_base64
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.chat import Message

MAX_LINE_BYTES = 128 << 20  # room for one picture of MAX_PICTURE_BYTES in base64
LONGEST_INDEX = 64  # characters; the smallest picture has more
COLUMNS = ("index", "image", "question", "answer")
CHOOSE = "Answer with the letter of the right option."


class QuestionTable(Sequence[list[Message]]):
    """The rows of a table as conversations of one question; only their places in the file are held in memory.

    Raises:
      UserError: on opening, a file that is no such table, without rows, with a missing column or with an index twice; with an
        index, a row without an answer, with a damaged picture or one that refers to no row.
    """

    def __init__(self, path: str | Path, image_root: str | None = None):
        del image_root  # pictures are inside
        self._path = Path(path)
        csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
        try:
            with open(path, "rb") as file:
                self._index(file)
        except (csv.Error, OSError) as error:  # csv: a quote that does not close, a cell beyond the limit
            raise UserError(f"{path}: cannot be read ({error}), expected a tab-separated table.") from error
        if not len(self):
            raise UserError(f"{path}: found no row below the column names, expected at least one.")

    def _index(self, file) -> None:
        lines = _Lines(file, self._path)
        reader = csv.reader(lines, delimiter="\t", strict=True)
        self._columns = [name.lstrip("\ufeff") for name in next(reader, [])]
        missing = [name for name in COLUMNS if name not in self._columns]
        if missing:
            raise UserError(f"{self._path}: has no column {missing[0]!r}, expected {', '.join(COLUMNS)}.")
        twice = [name for name in self._columns if self._columns.count(name) > 1]
        if twice:
            raise UserError(f"{self._path}: has column {twice[0]!r} twice, expected it once.")
        starts, ends, start = [], [], lines.place
        self._rows: dict[str, int] = {}  # index -> row
        for cells in reader:
            if cells:  # else a blank line
                name = dict(zip(self._columns, cells)).get("index", "")
                if name in self._rows:
                    first, here = self._rows[name] + 1, len(starts) + 1
                    raise UserError(f"{self._path}: rows {first} and {here} both have index {name[:80]!r}, expected each once.")
                if name:
                    self._rows[name] = len(starts)
                starts.append(start)
                ends.append(lines.place)
            start = lines.place
        self._starts, self._ends = np.array(starts, np.int64), np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> list[Message]:
        try:
            return self._conversation(self._cells(index))
        except UserError as error:
            raise UserError(f"{self._path}: row {index + 1}: {error}") from error

    def _cells(self, row: int) -> dict[str, str]:
        start, end = int(self._starts[row]), int(self._ends[row])
        with open(self._path, "rb") as file:
            file.seek(start)
            text = file.read(end - start).decode("utf-8", "replace")
        try:
            cells = next(csv.reader(io.StringIO(text, newline="\n"), delimiter="\t", strict=True), [])
        except csv.Error as error:
            raise UserError(f"cannot be read ({error}).") from error
        if len(cells) != len(self._columns):
            raise UserError(f"has {len(cells)} cells, expected {len(self._columns)}, one for each column.")
        if "\ufffd" in text:
            raise UserError("is not valid UTF-8.")
        return dict(zip(self._columns, cells, strict=True))

    def _conversation(self, cells: dict[str, str]) -> list[Message]:
        question, answer = cells["question"].strip(), cells["answer"].strip()
        if not answer:
            raise UserError("answer is empty, expected one to learn.")
        options = {letter: cells[letter] for letter in string.ascii_uppercase if cells.get(letter, "").strip()}
        if options and answer not in options:
            raise UserError(f"answer is {answer[:80]!r}, expected the letter of an option, {', '.join(options)}.")
        lines = [cells.get("hint", "").strip(), question, *(f"{letter}. {text}" for letter, text in options.items())]
        text = "\n".join([line for line in lines if line] + [CHOOSE] * bool(options))
        pictures = [{"type": "image", "image": picture} for picture in self._pictures(cells["image"])]
        return [
            {"role": "user", "content": [*pictures, {"type": "text", "text": text}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]

    def _pictures(self, cell: str) -> list:
        if 0 < len(cell) <= LONGEST_INDEX:
            if cell not in self._rows:
                raise UserError(f"image is {cell!r}, expected base64 or the index of a row.")
            cell = self._cells(self._rows[cell])["image"]
            if len(cell) <= LONGEST_INDEX:
                raise UserError("image refers to a row that has no picture itself.")
        if cell.startswith("["):
            texts = [text.strip().strip("'\"") for text in cell.strip().strip("[]").split(",")]
        else:
            texts = [cell] if cell else []
        return [decode_base64(text, f"image {number}") for number, text in enumerate(texts, start=1)]


class _Lines(Iterator[str]):
    """Lines of an open binary file for the csv module, and the place behind the last one."""

    def __init__(self, file, path: Path):
        self._file, self._path, self.place = file, path, 0

    def __next__(self) -> str:
        line = self._file.readline(MAX_LINE_BYTES + 1)
        if not line:
            raise StopIteration
        if len(line) > MAX_LINE_BYTES:
            raise UserError(f"{self._path}: has a line of more than {MAX_LINE_BYTES:,} bytes, expected fewer.")
        self.place += len(line)
        return line.decode("utf-8", "replace")
