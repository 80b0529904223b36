"""Real tables as strings: reading them, and finding in them what a chart can show."""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

import numpy as np

from andesvl_jax.data.examples import pick

MAX_ROWS = 2_000  # of a table; longer ones are cut
MAX_COLUMNS = 100
MAX_CELL = 200  # characters
LONGEST_NAME = 14  # characters of a name on an axis
DIGITS = 4  # significant ones of a number in a chart
NUMBER = re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,9})?")
MISSING = ("", "NA", "NaN", "null", "None")
TIMES = re.compile(r"year|date|time|month|week|day|quarter", re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """A table by columns of strings of one length; "" stands for a missing value."""

    name: str
    title: str
    columns: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Series:
    """What a chart shows: names, and one number beside each, just as it will be written."""

    table: str
    title: str
    unit: str  # what the numbers are
    names: tuple[str, ...]
    values: tuple[Decimal, ...]
    course: bool  # one after the other in time


def from_csv(name: str, title: str, text: str) -> Table:
    """A table whose first line holds the names of its columns. A first column without a name holds names of rows."""
    rows = list(zip(range(MAX_ROWS + 1), csv.reader(io.StringIO(text)), strict=False))
    if not rows:
        return Table(name, title, {})
    header = [column.strip() for column in rows[0][1]]
    return _table(name, title, header, [row for _, row in rows[1:] if len(row) == len(header)])


def from_json(name: str, title: str, text: str) -> Table:
    """A table that is a JSON array of objects; values that are no text or number count as missing."""
    records = json.loads(text)
    records = [r for r in records[:MAX_ROWS] if isinstance(r, dict)] if isinstance(records, list) else []
    header = list(dict.fromkeys(str(key) for record in records for key in record))
    plain = lambda value: str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""  # noqa: E731
    return _table(name, title, header, [[plain(record.get(key)) for key in header] for record in records])


def _table(name: str, title: str, header: list[str], rows: list[list[str]]) -> Table:
    cells = [["" if cell in MISSING else cell.strip()[:MAX_CELL] for cell in row] for row in rows]
    columns = {column: tuple(row[i] for row in cells) for i, column in enumerate(header[:MAX_COLUMNS])}
    return Table(name, title, columns)


def number(cell: str) -> Decimal | None:
    """The number that a cell holds, None for anything else."""
    if not NUMBER.fullmatch(cell):
        return None
    try:
        return Decimal(cell)
    except InvalidOperation:
        return None


def shown(value: Decimal) -> Decimal:
    """A number as a chart writes it: whole numbers whole, others with DIGITS significant digits and at most as many places."""
    if value != value.to_integral_value():
        value = round(value, min(max(DIGITS - 1 - value.adjusted(), 0), DIGITS)).normalize()
    return value if value.as_tuple().exponent < 0 else value.quantize(Decimal(1))


def fingerprint(table: Table) -> frozenset[bytes]:
    """A digest of each column, whatever its name and the order of its rows.

    Columns of fewer than five different values, and numberings of the rows, say nothing and are left out.
    """
    count = len(next(iter(table.columns.values()), ()))
    index = {str(i) for i in range(count + 1)}
    found = set()
    for cells in table.columns.values():
        if len(set(cells)) >= 5 and not set(cells) <= index:
            values = sorted(str(n.normalize()) if (n := number(cell)) is not None else cell.lower() for cell in cells)
            found.add(hashlib.sha256("\n".join(values).encode()).digest())
    return frozenset(found)


def same_data(one: frozenset[bytes], other: frozenset[bytes]) -> bool:
    """True where at least half the columns of the smaller table, by `fingerprint`, stand in the other one."""
    least = min(len(one), len(other))
    return least > 0 and 2 * len(one & other) >= least


def draw_series(rng: np.random.Generator, table: Table) -> Series | None:
    """Three to nine rows of a table, or how often a word stands in one of its columns; None where the draw found nothing fit."""
    kind = pick(rng, ("rows", "rows", "rows", "counts", "course", "course"))
    return {"rows": _rows, "counts": _counts, "course": _course}[kind](rng, table)


def _rows(rng: np.random.Generator, table: Table) -> Series | None:
    """Some rows: their names from a column of words, their numbers from another."""
    words = [column for column, cells in table.columns.items() if _are_names(cells)]
    numbers = _numeric(table)
    if not words or not numbers:
        return None
    word, column = pick(rng, words), pick(rng, numbers)
    order = rng.permutation(len(table.columns[word])).tolist()
    return _series(table, column, word, order, int(rng.integers(3, 9)), course=False)


def _course(rng: np.random.Generator, table: Table) -> Series | None:
    """Neighbouring rows of a column of times that rises."""
    numbers = _numeric(table)
    times = [column for column in numbers if _rises(table.columns[column]) and (TIMES.search(column) or _years(table, column))]
    others = [column for column in numbers if column not in times]
    if not times or not others:
        return None
    time, column = pick(rng, times), pick(rng, others)
    cells = table.columns[time]
    step, count = int(rng.integers(1, 4)), int(rng.integers(4, 10))
    start = int(rng.integers(max(1, len(cells) - step * count + 1)))
    return _series(table, column, time, list(range(start, len(cells), step)), count, course=True)


def _counts(rng: np.random.Generator, table: Table) -> Series | None:
    """How many rows there are of each word in a column of few different words."""
    columns = [c for c, cells in table.columns.items() if c and 2 < len(set(cells) - {""}) <= 8 and _are_words(cells)]
    if not columns:
        return None
    column = pick(rng, columns)
    counts = Counter(cell for cell in table.columns[column] if cell)
    if len(set(counts.values())) < 2:
        return None
    names = [list(counts)[i] for i in rng.permutation(len(counts)).tolist()]
    return Series(table.name, table.title, f"rows by {column}", tuple(names), tuple(Decimal(counts[n]) for n in names), False)


def _series(table: Table, column: str, naming: str, order: Iterable[int], count: int, course: bool) -> Series | None:
    names: dict[str, Decimal] = {}
    for i in order:
        name, value = table.columns[naming][i], number(table.columns[column][i])
        if name and value is not None and len(name) <= LONGEST_NAME and name not in names and len(names) < count:
            names[name] = shown(value)
    if len(names) < 3 or len(set(names.values())) < 2:
        return None
    return Series(table.name, table.title, column, tuple(names), tuple(names.values()), course)


def _numeric(table: Table) -> list[str]:
    """Named columns with numbers in most of their cells, but no mere numbering of the rows."""
    found = []
    for column, cells in table.columns.items():
        parsed = [n for cell in cells[:200] if (n := number(cell)) is not None]
        numbering = all(cell == str(i + 1) for i, cell in enumerate(cells[:200]))
        if column and len(parsed) >= max(3, len(cells[:200]) // 2) and len(set(parsed)) > 3 and not numbering:
            found.append(column)
    return found


def _is_name(cell: str) -> bool:
    return len(cell) <= LONGEST_NAME and cell.isprintable() and any(map(str.isalpha, cell))


def _are_words(cells: tuple[str, ...]) -> bool:
    given = {cell for cell in cells if cell}
    return all(map(_is_name, given))


def _are_names(cells: tuple[str, ...]) -> bool:
    """Different words of a length that fits an axis, in three cells at least."""
    short = [cell for cell in cells if len(cell) > 1 and _is_name(cell)]
    return len(short) >= 3 and len(set(short)) == len(short) and 2 * len(short) >= len(cells)


def _rises(cells: tuple[str, ...]) -> bool:
    values = [number(cell) for cell in cells]
    return None not in values and all(a < b for a, b in zip(values, values[1:], strict=False))


def _years(table: Table, column: str) -> bool:
    return all(re.fullmatch("1[5-9]..|20..", cell) for cell in table.columns[column])
