"""Conversation files in both styles become the same samples, and a bad record is named."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from andesvl_jax.data import conversations
from andesvl_jax.data.conversations import Conversations
from andesvl_jax.data.mixture import Mixture, examples
from andesvl_jax.data.pipeline import PackedBatches, to_sample
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.packing import Budget
from andesvl_jax.inputs.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_merges([])
PROCESSOR = ImageProcessor(patch_size=2, max_size=24)

LLAVA = [
    {
        "id": "a", "image": "cats/1.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat, not an <image>."},
            {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "<think>hm</think>Yes."},
        ],
    },
    {
        "id": "b", "image": ["cats/2.png", "cats/1.png"],
        "conversations": [{"from": "human", "value": "Is <image> like <image>?"}, {"from": "gpt", "value": "No."}],
    },
    {"id": "c", "system": "Be brief.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
]  # fmt: skip
CHATML = [
    {
        "images": ["cats/1.png"],
        "messages": [
            {"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A cat, not an <image>."},
            {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "<think>hm</think>Yes."},
        ],
    },
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Is "}, {"type": "image", "image": "cats/2.png"}, {"type": "text", "text": " like "},
                    {"type": "image_url", "image_url": {"url": "cats/1.png"}}, {"type": "text", "text": "?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
        ],
    },
    {
        "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
        ],
    },
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "cats").mkdir()
    for name, size in (("1", (9, 6)), ("2", (13, 13))):
        pixels = np.random.default_rng(int(name)).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "cats" / f"{name}.png")
    return tmp_path


def write(path, records):
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n"
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(records), encoding="utf-8")
    return path


def samples(records):
    return [to_sample(record, TOKENIZER, PROCESSOR) for record in records]


def same(a, b) -> bool:
    pictures = len(a.images) == len(b.images) and all(map(np.array_equal, *([i.patches for i in s.images] for s in (a, b))))
    return pictures and np.array_equal(a.tokens, b.tokens) and np.array_equal(a.supervised, b.supervised)


def test_both_styles_in_both_containers_give_the_same_samples(folder):
    expected = samples(Conversations(write(folder / "llava.json", LLAVA)))
    assert [len(s.images) for s in expected] == [1, 2, 0]
    for name, records in (("a.jsonl", LLAVA), ("b.jsonl", CHATML), ("c.json", CHATML)):
        opened = Conversations(write(folder / name, records))
        assert len(opened) == 3 and all(map(same, samples(opened), expected)), name


def test_only_the_answers_are_learned_and_a_mark_in_one_is_text(folder):
    first, *_ = samples(Conversations(write(folder / "a.json", LLAVA)))
    learned = TOKENIZER.decode(first.tokens[first.supervised], skip_special=False)
    assert learned == "A cat, not an <image>.<|im_end|><think>hm</think>Yes.<|im_end|>"
    whole = TOKENIZER.decode(first.tokens, skip_special=False).replace("<|vision_pad|>", "")
    assert whole.startswith("<|im_start|>user\n<img></img>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat")
    assert TOKENIZER.token_id("<think>") in first.tokens  # the assistant's markup is real, a user's would be text


def test_pictures_may_live_in_another_folder(folder, tmp_path_factory):
    elsewhere = write(tmp_path_factory.mktemp("elsewhere") / "a.json", LLAVA)
    assert all(map(same, samples(Conversations(elsewhere, folder)), samples(Conversations(write(folder / "a.json", LLAVA)))))
    with pytest.raises(UserError, match=r"a.json: record 1: image is 'cats/1.png', expected a file inside"):
        Conversations(elsewhere)[0]
    with pytest.raises(UserError, match="no such image folder"):
        Conversations(elsewhere, folder / "none")


def test_blank_lines_a_byte_order_mark_and_a_missing_line_end(folder):
    lines = [json.dumps(record).encode() for record in CHATML]
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines))
    assert all(map(same, samples(Conversations(folder / "a.jsonl")), samples(Conversations(write(folder / "b.json", CHATML)))))


def test_a_file_in_a_mixture_is_trained_on_whole_and_in_order_of_the_seed(folder):
    path = str(write(folder / "a.jsonl", LLAVA))
    mixture = Mixture({"pets": 1.0}, files={"pets": path}, seed=3)
    dataset = examples(mixture)
    for epoch in range(3):
        seen = [dataset[3 * epoch + i] for i in range(3)]
        assert sorted(map(str, seen)) == sorted(map(str, Conversations(path)))
    assert [str(dataset[i]) for i in range(6)] == [str(examples(mixture)[i]) for i in range(6)]
    packed = PackedBatches(dataset.map(lambda record: to_sample(record, TOKENIZER, PROCESSOR)), Budget(2, 256, 512, 96), 12)
    assert (next(iter(packed)).target_slots >= 0).any()
    mixed = examples(Mixture({"pets": 1.0, "word": 3.0}, files={"pets": path}))
    records = list(map(str, Conversations(path)))
    assert sum(str(mixed[i]) in records for i in range(40)) == 10
    with pytest.raises(UserError, match="data.weights names 'dogs', expected families among .*, pets"):
        Mixture({"dogs": 1.0}, files={"pets": path})
    with pytest.raises(UserError, match="data.files names 'word', which is a task family"):
        Mixture({"word": 1.0}, files={"word": path})


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (3, "found a int, expected an object"),
        ({}, "has no turns, expected one of conversations or messages"),
        ({"conversations": turns("a", "b"), "messages": []}, "has conversations and messages"),
        ({"conversations": "a"}, "conversations is 'a', expected a list of at least one turn"),
        ({"conversations": []}, "conversations is a list, expected a list of at least one turn"),
        ({"conversations": ["a"]}, "conversations[1] is 'a', expected an object with from and value"),
        ({"conversations": [*turns("a"), {"from": "bing", "value": "b"}]}, "conversations[2].from is 'bing', expected"),
        ({"conversations": [{"from": ["human"], "value": "b"}]}, "conversations[1].from is a list"),
        ({"conversations": turns("a", None)}, "conversations[2].value is None, expected a string or a list"),
        ({"messages": [{"role": "tool", "content": "b"}]}, "messages[1].role is 'tool'"),
        ({"messages": [{"role": "user", "content": ["b"]}]}, "messages[1].content has an item of type None"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[1].content is None, expected a string"),
        (
            {"image": "cats/1.png", "messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
            "messages[1].content has an item of type 'image', expected text, or image or image_url in a user turn",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "of type image without a path"),
        ({"conversations": turns("a")}, "conversations has no answer of the assistant"),
        ({"conversations": turns("a", " ")}, "conversations has no answer of the assistant"),
        ({"conversations": turns("a \ud800", "b")}, "conversations[1].value has lone surrogates"),
        ({"conversations": turns("a", "b"), "system": 3}, "system is 3, expected a string"),
        ({"conversations": turns("<image><image>", "b"), "image": "cats/1.png"}, "conversations[1].value has more <image> marks"),
        ({"conversations": turns("a", "<image>"), "image": "cats/1.png"}, "without an <image> mark in a user turn: 1"),
        ({"conversations": turns("<image>", "b"), "image": "cats/3.png"}, "image is 'cats/3.png', expected a file inside"),
        ({"conversations": turns("<image>", "b"), "image": "cats"}, "image is 'cats', expected a file inside"),
        ({"conversations": turns("<image>", "b"), "image": "../secret.png"}, "image is '../secret.png', expected a file inside"),
        ({"conversations": turns("<image>", "b"), "image": "/etc/hostname"}, "image is '/etc/hostname', expected a file inside"),
        ({"conversations": turns("<image>", "b"), "image": "link.png"}, "image is 'link.png', expected a file inside"),
        ({"conversations": turns("<image>", "b"), "image": "a\0b"}, "expected a file inside"),
        ({"conversations": turns("<image>", "b"), "image": "x" * 5000}, "expected a file inside"),
        ({"conversations": turns("<image>", "b"), "image": ["https://example.com/a.png"]}, "nothing is downloaded"),
        ({"conversations": turns("<image>", "b"), "image": {"path": "a"}}, "image is a dict, expected the path of a picture"),
        ({"conversations": turns("<image>", "b"), "image": "cats/1.png", "images": []}, "has image and images"),
        ({"conversations": turns("a", "b"), "video": "a.mp4"}, "video is given, which this model has no input for"),
    ],
)  # fmt: skip
def test_a_bad_record_is_named(folder, record, message):
    inside = folder / "data"
    inside.mkdir()
    (folder / "cats").rename(inside / "cats")
    Image.new("RGB", (4, 4)).save(folder / "secret.png")
    os.symlink(folder / "secret.png", inside / "link.png")
    for name in ("a.json", "a.jsonl"):
        (inside / name).unlink(missing_ok=True)
        records = [*LLAVA, record]
        text = json.dumps(records) if name == "a.json" else "\n".join(map(json.dumps, records))
        (inside / name).write_text(text)
        with pytest.raises(UserError, match=re.escape(f"{name}: record 4: ") + ".*" + re.escape(message)) as caught:
            Conversations(inside / name)[3]
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found no record"),
        (b"[]", "found no record"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"messages": ' + b"[" * 100_000, "record 1: not valid JSON"),
        (json.dumps(CHATML[2]).encode() + b"\n{broken", "record 2: not valid JSON"),
        (b"[{]", "not valid JSON"),
        (b"\xff\xfe", "record 1: not valid JSON"),
        (b'{"messages": 1' + b" " * 2000 + b"}", "record 1: has more than 1,000 bytes"),
        (b"[" + b" " * 4000 + b"]", "has 4,002 bytes, expected at most 3,000 in a JSON array; write JSONL"),
    ],
)
def test_a_bad_file_is_named(tmp_path, monkeypatch, content, message):
    if b"    " in content:
        monkeypatch.setattr(conversations, "MAX_LINE_BYTES", 1000)
        monkeypatch.setattr(conversations, "MAX_ARRAY_BYTES", 3000)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match="a.json: " + re.escape(message)):
        list(Conversations(tmp_path / "a.json"))


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            Conversations(path)
