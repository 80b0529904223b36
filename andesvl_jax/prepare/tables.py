"""Real tables as strings: reading them, and finding in them what a chart can show."""

import csv
import functools
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation

import numpy as np

from andesvl_jax.data.examples import pick

MAX_ROWS = 2_000  # of a table; longer ones are cut
MAX_COLUMNS = 100
MAX_CELL = 200  # characters
SAMPLE = 200  # rows by which a column is judged
MOST_GROUPS = 8
MOST_NUMBERS = 9  # in a chart
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

    @functools.cached_property
    def numeric(self) -> tuple[str, ...]:
        """Columns of numbers."""
        return tuple(column for column, cells in self.columns.items() if column and _are_numbers(cells[:SAMPLE]))

    @functools.cached_property
    def times(self) -> tuple[str, ...]:
        """Columns of numbers that rise and are years, or bear the name of a time."""
        return tuple(c for c in self.numeric if (TIMES.search(c) or _are_years(self.columns[c])) and _rise(self.columns[c]))

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Columns of different words."""
        return tuple(column for column, cells in self.columns.items() if _are_names(cells))

    @functools.cached_property
    def groups(self) -> tuple[str, ...]:
        """Columns of a few words that repeat."""
        return tuple(column for column, cells in self.columns.items() if column and _are_groups(cells))


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


def draw_series(rng: np.random.Generator, table: Table, most: int, longest: int) -> Series | None:
    """Some rows of a table, or how often words stand in one of its columns; None where the draw found nothing fit.

    Args:
      most: numbers at most, three or more. longest: characters of a name at most.
    """
    values = tuple(column for column in table.numeric if column not in table.times)
    kinds = [_rows, _rows] * bool(table.names and values) + [_course, _course] * bool(table.times and values)
    kinds += [_counts] * bool(table.groups)
    series = pick(rng, kinds)(rng, table, values, longest) if kinds else None
    if series is None:
        return None
    count = int(rng.integers(3, most + 1))
    series = replace(series, names=series.names[:count], values=series.values[:count])
    fits = len(series.names) >= 3 and len(set(series.values)) > 1 and max(map(len, series.names)) <= longest
    return series if fits else None


def _rows(rng: np.random.Generator, table: Table, values: tuple[str, ...], longest: int) -> Series | None:
    """Some rows: their names from a column of words, their numbers from another."""
    name, column = pick(rng, table.names), pick(rng, values)
    order = rng.permutation(len(table.columns[name])).tolist()
    return _series(table, column, name, order, longest, course=False)


def _course(rng: np.random.Generator, table: Table, values: tuple[str, ...], longest: int) -> Series | None:
    """Rows at even steps in a column of times."""
    time, column = pick(rng, table.times), pick(rng, values)
    count_of_rows = len(table.columns[time])
    step = int(rng.integers(1, 4))
    start = int(rng.integers(max(1, count_of_rows - step * MOST_NUMBERS + 1)))
    return _series(table, column, time, range(start, count_of_rows, step), longest, course=True)


def _counts(rng: np.random.Generator, table: Table, values: tuple[str, ...], longest: int) -> Series | None:
    """How many rows there are of each word in a column."""
    column = pick(rng, table.groups)
    counts = Counter(cell for cell in table.columns[column] if cell)
    names = [list(counts)[i] for i in rng.permutation(len(counts)).tolist()]
    return Series(table.name, table.title, f"rows by {column}", tuple(names), tuple(Decimal(counts[n]) for n in names), False)


def _series(table: Table, column: str, naming: str, order: Iterable[int], longest: int, course: bool) -> Series:
    names: dict[str, Decimal] = {}
    for i in order:
        name, value = table.columns[naming][i], number(table.columns[column][i])
        if name and value is not None and len(name) <= longest and name not in names and len(names) < MOST_NUMBERS:
            names[name] = shown(value)
    return Series(table.name, table.title, column, tuple(names), tuple(names.values()), course)


def _are_numbers(cells: tuple[str, ...]) -> bool:
    """Numbers in half of the cells or more, but no mere numbering of the rows."""
    parsed = [n for cell in cells if (n := number(cell)) is not None]
    numbering = all(cell == str(i + 1) for i, cell in enumerate(cells))
    return len(parsed) >= max(3, len(cells) // 2) and len(set(parsed)) > 3 and not numbering


def _are_years(cells: tuple[str, ...]) -> bool:
    return all(re.fullmatch("1[5-9]..|20..", cell) for cell in cells)


def _rise(cells: tuple[str, ...]) -> bool:
    values = [number(cell) for cell in cells]
    return None not in values and all(a < b for a, b in zip(values, values[1:], strict=False))


def _is_name(cell: str) -> bool:
    return len(cell) <= LONGEST_NAME and cell.isprintable() and any(map(str.isalpha, cell))


def _are_names(cells: tuple[str, ...]) -> bool:
    """Different words that fit an axis, in three cells and in half of them at least."""
    short = [cell for cell in cells if len(cell) > 1 and _is_name(cell)]
    return 2 * len(short) >= len(cells) and len(short) >= 3 and len(set(short)) == len(short)


def _are_groups(cells: tuple[str, ...]) -> bool:
    given = set(cells) - {""}
    return 2 < len(given) <= MOST_GROUPS and all(map(_is_name, given))
