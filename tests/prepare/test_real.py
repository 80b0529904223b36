"""Real pictures: what the writer writes and refuses, and runs that are interrupted. The sources here are made up."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import andesvl_jax as avl
from andesvl_jax.cli import main
from andesvl_jax.data.examples import Turn
from andesvl_jax.data.sources import open_source
from andesvl_jax.prepare import held_out, real
from andesvl_jax.prepare.items import Card, Item, LeftOut, jpeg, png, split_of
from andesvl_jax.prepare.writer import write_source

CARD = Card("dots", "Coloured dots.", (), "Nothing is held out.", 90)
COUNT = 100


def picture(i: int, encode=png) -> bytes:
    return encode(Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 12, 3), np.uint8)))


def item(i: int, **changes) -> Item:
    content = f"dot {i}"
    turns = (Turn("dots", f"Which dot is it <{i}>?", f"点 {i}"), Turn("dots", "How many?", "1"))
    fields = {"picture": picture(i), "turns": turns, "content": content, "split": split_of(content), "keys": ("text:dot",)}
    return Item(**(fields | changes))


def make(cache, seed, side):
    for i in range(COUNT):
        yield item(i)
    yield from (LeftOut(f"text:{i % 7}", "odd") for i in range(14))


def test_what_is_written_is_read_as_conversations(tmp_path):
    made = [item(i, picture=picture(i, (png, jpeg)[i % 2])) for i in range(COUNT)]
    manifest = write_source(CARD, made, tmp_path / "dots", {})
    for split in ("train", "validation"):
        source, expected = open_source(str(tmp_path / "dots" / f"{split}.tar")), [i for i in made if i.split == split]
        assert len(source) == len(expected) == manifest[split]["items"] > 0
        for messages, item_ in zip(map(source.__getitem__, range(len(source))), expected, strict=True):
            assert messages[0]["content"][1:] == [{"type": "text", "text": item_.turns[0].question}]
            assert [m["content"][0]["text"] for m in messages if m["role"] == "assistant"] == [t.answer for t in item_.turns]
            shown = np.array(messages[0]["content"][0]["image"])
            np.testing.assert_array_equal(shown, np.array(Image.open(io.BytesIO(item_.picture))))


def test_the_manifest_counts_and_equal_items_give_equal_files(tmp_path):
    for name in ("a", "b"):
        manifest = write_source(CARD, [*make(None, 0, 0), item(0)], tmp_path / name, {})
    train = [i for i in range(COUNT) if item(i).split == "train"]
    again = item(0).split == "train"
    assert manifest["train"] == {
        "items": len(train) + again, "questions": 2 * len(train) + 2 * again, "distinct": 2 * len(train)
    }  # fmt: skip
    assert manifest["left_out"] == {"odd": 7} and manifest["tasks"] == {"dots": manifest["train"]["questions"]}
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    page = (tmp_path / "a" / "card.html").read_text()
    assert "Which dot is it &lt;" in page and "data:image/png;base64," in page


HELD = next(f"emoji:{i:x}" for i in range(0x1F600, 0x1F700) if held_out.emoji(f"{i:x}"))


@pytest.mark.parametrize("key", [HELD, "language:ja", "emoji:1f44b-1f3fb"])
def test_an_item_with_a_held_out_key_is_refused_and_nothing_stays(key, tmp_path):
    with pytest.raises(avl.UserError, match=f"dots: {key} is held out"):
        write_source(CARD, [item(0), item(1, keys=("text:dot", key))], tmp_path / "dots", {})
    assert not list(tmp_path.iterdir())


def test_content_and_pictures_stay_in_one_split(tmp_path):
    for changes in ({"split": "validation"}, {"split": "validation", "content": "another"}):
        with pytest.raises(avl.UserError, match="is in both splits"):
            write_source(CARD, [item(0, split="train"), item(0, **changes)], tmp_path / "dots", {})


@pytest.mark.parametrize(
    "changes", [{"keys": ()}, {"turns": ()}, {"split": "test"}, {"keys": ("smiley:1",)}, {"picture": b"GIF8"}]
)
def test_items_without_what_is_needed_are_mistakes(changes, tmp_path):
    with pytest.raises(ValueError):
        write_source(CARD, [item(0, **changes)], tmp_path / "dots", {})
    assert not list(tmp_path.iterdir())


def test_a_source_without_items_is_refused(tmp_path):
    with pytest.raises(avl.UserError, match="found nothing to train on"):
        write_source(CARD, [], tmp_path / "dots", {})


@pytest.fixture
def made_up(monkeypatch):
    """Two sources; the second fails until it is mended. Counts how often each is made."""
    made = {"first": 0, "second": 0, "broken": True}

    def module(name):
        def make_counted(cache, seed, side):
            made[name] += 1
            for i, made_item in enumerate(make(cache, seed, side)):
                if name == "second" and made["broken"] and i == COUNT // 2:
                    raise KeyboardInterrupt
                yield made_item

        return SimpleNamespace(CARD=Card(name, "Dots.", (), "Nothing is held out.", 90), make=make_counted)

    monkeypatch.setattr(real, "SOURCES", {name: module(name) for name in ("first", "second")})
    monkeypatch.setattr(real, "_code", lambda: "code")
    return made


def test_an_interrupted_run_goes_on_where_it_was(made_up, tmp_path):
    out = tmp_path / "real"
    with pytest.raises(KeyboardInterrupt):
        real.prepare_real(out)
    assert [path.name for path in out.iterdir()] == ["first"], "nothing half-written stays"
    made_up["broken"] = False
    (out / ".third.killed").mkdir()
    (out / ".third.killed" / "manifest.json").write_text('{"name": "third"}')
    whole = real.prepare_real(out)
    assert (made_up["first"], made_up["second"]) == (1, 2)
    assert json.loads((out / "manifest.json").read_text()) == whole
    assert list(whole["sources"]) == ["first", "second"]
    real.prepare_real(out)
    assert (made_up["first"], made_up["second"]) == (1, 2), "a finished source is not made again"
    real.prepare_real(out, only=["first"], seed=1)
    assert (made_up["first"], made_up["second"]) == (2, 2), "other arguments make it again"
    (out / "first" / "manifest.json").write_text("{")
    real.prepare_real(out, only=["first"], seed=1)
    assert made_up["first"] == 3, "a manifest that cannot be read stands for nothing"


def test_a_directory_that_is_no_source_is_not_replaced(made_up, tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "thesis.txt").write_text("mine")
    with pytest.raises(avl.UserError, match="exists and is no earlier source"):
        real.prepare_real(tmp_path, only=["first"])
    assert (tmp_path / "first" / "thesis.txt").read_text() == "mine"


def test_the_command(made_up, tmp_path, capsys):
    made_up["broken"] = False
    assert main(["prepare", "real", "--out", str(tmp_path / "real"), "--only", "second", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["sources"]["second"]["train"]["items"] > 0 and "first" not in result["sources"]
    assert main(["prepare", "real", "--out", str(tmp_path / "real"), "--only", "third"]) == 2
    assert "found 'third', expected one of first, second" in capsys.readouterr().err
    assert main(["prepare", "real"]) == 2
    assert main(["prepare", "--list", "--json"]) == 0
    printed = capsys.readouterr().out
    assert [row["name"] for row in json.loads(printed.splitlines()[-1])["rows"]] == ["smollm2", "first", "second"]


def test_every_source_says_what_it_is():
    for name, module in real.SOURCES.items():
        card = module.CARD
        assert card.name == name and card.packages and card.questions > 0 and card.held_out.endswith(".")
        assert not [package.name for package in card.packages if held_out.package(package.name)]
