"""The same conversations in every kind of file are the same samples, and no hostile file gets further than one sentence."""

import base64
import csv
import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from andesvl_jax.data import pictures, tar, tsv
from andesvl_jax.data.array_record import pack_record, write_array_record
from andesvl_jax.data.mixture import Bad, Mixture, examples
from andesvl_jax.data.pipeline import to_sample
from andesvl_jax.data.sources import open_source
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_merges([])
PROCESSOR = ImageProcessor(patch_size=2, max_size=24)
QUESTIONS = [('What\tis "it"?\nSay.', "A cat."), ("Which one \u2028?", "B"), ("", "红")]  # text that a table has to quote
INDEX = ("7", "x", "9")


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def b64(seed: int) -> str:
    return base64.b64encode(png(seed)).decode()


def conversation(question, answer):
    question = [{"type": "image"}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_table(path, rows, columns=("index", "image", "question", "answer")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([columns, *rows])
    return str(path)


def write_tar(path, members, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # a fraction makes an extended header, as WebDataset's writer does
            out.addfile(info, io.BytesIO(data))
    return str(path)


def every_kind(folder):
    """The conversations of QUESTIONS in each kind of file."""
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(i))
    records = [conversation(*qa) for qa in QUESTIONS]
    lines = [json.dumps(record | {"image": f"{i}.png"}) for i, record in enumerate(records)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "a.json").write_text(f"[{','.join(lines)}]")
    yield from (str(folder / "a.jsonl"), str(folder / "a.json"))
    yield write_table(folder / "a.tsv", [(INDEX[i], b64(i), *qa) for i, qa in enumerate(QUESTIONS)])
    members = [(f"{'long/' * 30}s{i}.{end}", data) for i in range(3)
               for end, data in (("png", png(i)), ("json", json.dumps(records[i] | {"image": "../../x"}).encode()))]  # fmt: skip
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        yield write_tar(folder / f"{form}.tar", members, form)
    write_array_record(folder / "a.array_record", [pack_record(record, [png(i)]) for i, record in enumerate(records)])
    yield str(folder / "a.array_record")


def test_the_same_conversations_in_every_kind_of_file_are_the_same_samples(tmp_path):
    expected = None
    for path in every_kind(tmp_path):
        source = open_source(path)
        assert len(source) == 3
        found = [to_sample(source[i], TOKENIZER, PROCESSOR) for i in (2, 0, 1)]  # random access, in any order
        expected = expected or found
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_array_equal(a.supervised, b.supervised)
            np.testing.assert_array_equal(a.images[0].patches, b.images[0].patches)
        mixture = Mixture({"a": 1.0}, files={"a": path}, limits={"a": 2})
        dataset = examples(mixture)
        assert len({text(dataset[i]) for i in range(20)}) == 2


def text(messages) -> str:
    return "".join(item["text"] for message in messages for item in message["content"] if item["type"] == "text")


def test_a_table_with_options_hints_and_shared_pictures(tmp_path):
    columns = ("index", "image", "question", "answer", "A", "B", "C", "hint")
    rows = [("1", b64(0), "Which?", "B", "red", "blue", "", "Look."), ("2", "1", "And?", "no", "", "", "", ""),
            ("3", f"['{b64(0)}', '{b64(1)}']", "Two?", "yes", "", "", "", "")]  # fmt: skip
    table = open_source(write_table(tmp_path / "a.tsv", rows, columns))
    assert text(table[0]) == f"Look.\nWhich?\nA. red\nB. blue\n{tsv.CHOOSE}B"
    images = [[np.asarray(item["image"]) for item in record[0]["content"] if item["type"] == "image"] for record in table]
    assert [len(found) for found in images] == [1, 1, 2]
    np.testing.assert_array_equal(images[0][0], images[1][0])


def test_captions_in_a_tar(tmp_path):
    shard = open_source(write_tar(tmp_path / "a.tar", [("a.JPG.png", png(0)), ("a.txt", b" A cat. \n")]))
    assert len(shard) == 1 and text(shard[0]) == f"{tar.DESCRIBE}A cat."


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("1", b64(0), "Q", ""), "row 2: answer is empty"),
        (("1", b64(0), "Q"), "row 2: has 3 cells, expected 4"),
        (("1", b64(0)[:-30], "Q", "A"), "row 2: image 1: PIL image: the image data are truncated"),
        (("1", b64(0)[:-9] + "\x00" * 9, "Q", "A"), "row 2: image 1 is no base64"),
        (("1", base64.b64encode(bomb()).decode(), "Q", "A"), "row 2: image 1"),
        (("1", base64.b64encode(bytes(90)).decode(), "Q", "A"), "row 2: image 1 cannot be opened as an image"),
        (("1", "A" * 1500, "Q", "A"), "row 2: image 1 has 1,500 characters, expected at most 1,333"),
        (("1", "3", "Q", "A"), "row 2: image is '3', expected base64 or the index of a row"),
        (("1", "1", "Q", "A"), "row 2: image refers to a row that has no picture"),
        (("1", "/etc/hostname", "Q", "A"), "row 2: image is '/etc/hostname', expected base64 or the index"),
    ],
)
def test_a_bad_row_is_named_and_the_others_stand(tmp_path, monkeypatch, row, message):
    monkeypatch.setattr(pictures, "MAX_PICTURE_BYTES", 1000)
    path = write_table(tmp_path / "a.tsv", [("0", b64(0), "Q", "A"), row, ("2", b64(1), "Q", "A")])
    table = open_source(path)
    with pytest.raises(UserError, match="a.tsv: " + message) as caught:
        table[1]
    assert "\n" not in str(caught.value)
    assert text(table[0]) == text(table[2]) == "QA"
    found = [examples(Mixture({"a": 1.0}, files={"a": path}))[i] for i in range(6)]
    assert sum(isinstance(record, Bad) for record in found) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no column 'index'"),
        (b"index\timage\tquestion\n1\t2\t3\n", "has no column 'answer'"),
        (b"index\timage\tquestion\tanswer\tanswer\n", "has column 'answer' twice"),
        (b"index\timage\tquestion\tanswer\n", "found no row"),
        (b"index\timage\tquestion\tanswer\n1\ta\tb\tc\n2\ta\tb\tc\n1\ta\tb\tc\n", "rows 1 and 3 both have index '1'"),
        (b'index\timage\tquestion\tanswer\n1\t"a\tb\tc\n', "cannot be read .unexpected end of data"),
        (b"index\timage\tquestion\tanswer\n1\t" + b"a" * 3000, "has a line of more than 2,000 bytes"),
    ],
)
def test_a_bad_table_is_refused_when_opened(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(tsv, "MAX_LINE_BYTES", 2000)
    (tmp_path / "a.tsv").write_bytes(content)
    with pytest.raises(UserError, match="a.tsv: " + message):
        open_source(str(tmp_path / "a.tsv"))


GOOD = json.dumps(conversation("Q", "A")).encode()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", png(0))], "has neither .json nor .txt"),
        ([("a.json", GOOD), ("a.txt", b"x")], "has json and txt, expected one"),
        ([("a.json", GOOD)], "of type image without a path"),
        ([("a.json", GOOD), ("a.png", b"torn")], ".png cannot be opened as an image"),
        ([("a.json", GOOD), ("a.png", bomb())], ".png"),
        ([("a.json", GOOD), ("a.png", b"x" * 1001)], ".png has 1,001 bytes, expected at most 1,000"),
        ([("a.json", b"[" * 100_000)], ".json cannot be read"),
        ([("a.json", b"\xff")], ".json cannot be read"),
        ([("a.json", b"3")], "found a int, expected an object"),
        ([("a.txt", b" "), ("a.png", png(0))], "messages has no answer of the assistant"),
        (
            [("a.json", GOOD.replace(b'"image"}', b'"image", "image": "/etc/hostname"}')), ("a.png", png(0))],
            "expected only",
        ),
    ],
)
def test_a_bad_sample_of_a_tar_is_named(tmp_path, monkeypatch, members, message):
    monkeypatch.setattr(pictures, "MAX_PICTURE_BYTES", 1000)
    monkeypatch.setattr(tar, "MAX_PICTURE_BYTES", 1000)
    shard = open_source(write_tar(tmp_path / "a.tar", members))
    with pytest.raises(UserError, match=r"a.tar: sample 1 \(/a\): .*" + message) as caught:
        shard[0]
    assert "\n" not in str(caught.value)


def header(**fields) -> bytes:
    """A tar header with these bytes in place of a field's."""
    info = tarfile.TarInfo("a.json")
    info.size = 10
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    places = {"size": (124, 12), "type": (156, 1)}
    for name, value in fields.items():
        start, width = places[name]
        block[start : start + width] = value.ljust(width, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


NEGATIVE = b"\xff" * 8 + struct.pack(">i", -1024)
HUGE = b"\x80" + (1 << 60).to_bytes(11, "big")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"no tar", b"\0" * 10240, header(), header() + bytes(5), header(size=NEGATIVE) + bytes(1024),
        header(size=HUGE) + bytes(1024), header(type=b"x", size=NEGATIVE) + bytes(999), header(type=b"x", size=HUGE) + bytes(999),
        header(type=b"L", size=HUGE) + bytes(2048), header(type=b"S") + bytes(2048), header(size=b"99") + bytes(1024),
        header() + bytes(512) + header() + bytes(512) + bytes(1024),
    ],
)  # fmt: skip
def test_a_torn_or_lying_tar_is_refused_when_opened(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match="a.tar: ") as caught:
        open_source(str(tmp_path / "a.tar"))
    assert "\n" not in str(caught.value)


def test_any_cut_of_a_tar_is_refused_or_gives_whole_samples(tmp_path):
    members = [(f"{i}.{end}", data) for i in range(2) for end, data in (("json", GOOD), ("png", png(i)))]
    whole = open(write_tar(tmp_path / "whole.tar", members), "rb").read()
    for size in range(0, len(whole), 97):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        try:
            for record in open_source(str(tmp_path / "a.tar")):
                assert text(record) == "QA"
        except UserError:
            pass


def test_links_in_a_tar_are_not_followed(tmp_path):
    (tmp_path / "secret.json").write_bytes(GOOD)
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo("../secret.json")
            info.type, info.linkname = kind, str(tmp_path / "secret.json")
            out.addfile(info)
    with pytest.raises(UserError, match="found no file in it"):
        open_source(str(tmp_path / "a.tar"))


RECORD = pack_record(conversation("Q", "A"), [png(0)])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "says that its JSON has 0 bytes, expected at most the 0"),
        (b"\xff\xff\xff\xff{}", "says that its JSON has 4,294,967,295 bytes, expected at most the 2"),
        (b"\x02\x00\x00\x00[]", "found a list, expected an object"),
        (b"\x02\x00\x00\x00[[", "its JSON cannot be read"),
        (RECORD[:-1], "picture_bytes is .*, expected whole numbers from 0 of"),
        (pack_record(conversation("Q", "A"), [])[:4] + RECORD[4:], ""),
        (pack_record(conversation("Q", "A"), [b"torn"]), "picture 1 cannot be opened"),
        (pack_record(conversation("Q", "A"), []), "messages.1..content has an item of type image without"),
        (pack_record(conversation("Q", "A") | {"image": "/etc/hostname"}, [png(0)]), "has image and images"),
    ],
)
def test_a_bad_array_record_is_named(tmp_path, raw, message):
    write_array_record(tmp_path / "a.array_record", [RECORD, raw])
    records = open_source(str(tmp_path / "a.array_record"))
    assert text(records[0]) == "QA"
    with pytest.raises(UserError, match="a.array_record: record 2: " + message):
        records[1]


def test_sizes_of_pictures_cannot_be_negative(tmp_path):
    head = json.dumps(conversation("Q", "A") | {"picture_bytes": [len(png(0)) + 5, -5]}).encode()
    write_array_record(tmp_path / "a.array_record", [len(head).to_bytes(4, "little") + head + png(0)])
    with pytest.raises(UserError, match="record 1: picture_bytes is .*, expected whole numbers from 0"):
        open_source(str(tmp_path / "a.array_record"))[0]


@pytest.mark.parametrize("cut", [0, 100, 65_536, 100_000, -10])
def test_a_torn_array_record_file_is_refused(tmp_path, cut):
    write_array_record(tmp_path / "whole.array_record", [RECORD] * 3)
    (tmp_path / "a.array_record").write_bytes((tmp_path / "whole.array_record").read_bytes()[:cut])
    with pytest.raises(UserError, match="a.array_record: cannot be read as an ArrayRecord file"):
        open_source(str(tmp_path / "a.array_record"))


def test_other_endings_and_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="a.zip: has ending '.zip', expected one of .json, .jsonl, .tsv, .tar, .array_record"):
        open_source(str(tmp_path / "a.zip"))
    for ending in ("jsonl", "tsv", "tar", "array_record"):
        with pytest.raises(UserError, match=f"none.{ending}: cannot be read"):
            open_source(str(tmp_path / f"none.{ending}"))


def test_a_file_that_vanishes_makes_bad_records(tmp_path):
    for path in every_kind(tmp_path):
        if path.endswith((".tsv", ".tar")):
            dataset = examples(Mixture({"a": 1.0}, files={"a": path}))
            (tmp_path / path).unlink()
            assert isinstance(dataset[0], Bad) and path in dataset[0].reason
