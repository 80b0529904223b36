"""Rebuilding from merges, round trips, escaping, streaming, and damaged files."""

import copy
import json
import random
import re
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, models

from andesvl_jax.errors import UserError
from andesvl_jax.inputs import tokenizer as tokenizer_module
from andesvl_jax.inputs.tokenizer import ADDED_TOKENS, SPLIT_PATTERN, DecodeStream, Tokenizer, read_merges

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"
TEXTS = [
    "", " ", "\n", "\n\n\n", "Hello world!", "It's 12345 + 67 = don't\tknow  \n\n  x", "描述这张图片。", "Ａ ﬁ é e\u0301",
    "👩‍👩‍👧 \u200b\x00",
    "<|im_start|>user\nhi<|im_end|>\n", "<think>\nso\n</think>\n\nyes", "<|box_start|>(437,104),(1120,130)<|box_end|>",
]  # fmt: skip


def write_merges(path, merges, header="#version: 0.2\n"):
    path.write_text(header + "".join(f"{left} {right}\n" for left, right in merges), encoding="utf-8")


def same_tokenizer(a: Tokenizer, b: Tokenizer) -> bool:
    same_ids = all(a.encode(text, special) == b.encode(text, special) for text in TEXTS for special in (False, True))
    return same_ids and a.vocab_size == b.vocab_size


def test_ids_follow_bytes_merges_and_added_tokens(tokenizer, merges):
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    assert [tokenizer.full.id_to_token(i) for i in range(94)] == [chr(byte) for byte in range(33, 127)]
    assert tokenizer.encode("\x00") == [order.index(0)] and tokenizer.encode("\x7f") == [order.index(127)]
    for rank, (left, right) in enumerate(merges):
        assert tokenizer.token_id(left + right) == 256 + rank
    first = 256 + len(merges)
    assert [tokenizer.token_id(name) for name, _ in ADDED_TOKENS] == list(range(first, first + 26))
    assert tokenizer.vocab_size == first + 26
    assert tokenizer.image_token_id - tokenizer.pad_id == 151654 - 151643
    assert (tokenizer.image_start_id, tokenizer.image_end_id) == (first + 9, first + 10)
    assert (tokenizer.im_start_id, tokenizer.im_end_id) == (first + 1, first + 2)


def test_a_prefix_of_the_merges_is_a_tokenizer(merges, tokenizer):
    small = Tokenizer.from_merges(merges[:20])
    assert small.vocab_size == 256 + 20 + 26
    for text in TEXTS:
        assert small.decode(small.encode(text, special=True), skip_special=False) == tokenizer.decode(
            tokenizer.encode(text, special=True), skip_special=False
        )


def test_the_split_rule_is_the_releases():
    """Digits stand alone, contractions and leading marks stay with letters, line breaks end a run of punctuation."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated")
    pieces = [piece for piece, _ in split.pre_tokenize_str("It's 12 don't\tknow?!\n\n  x (y)  \n z")]
    assert pieces == ["It", "'s", " ", "1", "2", " don", "'t", "\tknow", "?!\n\n", " ", " x", " (", "y", ")", "  \n", " z"]


def test_golden_cases_have_the_released_ids():
    """The fixture holds, with their ranks, the 647 of the 151,387 released merges that these texts need; the others never apply
    here, so the pieces are the released ones, and their ids follow from the ranks."""
    lines = (GOLDEN / "used_merges.txt").read_text(encoding="utf-8").splitlines()
    ranks, merges = zip(*((int(rank), (left, right)) for rank, left, right in map(str.split, lines)))
    subset = Tokenizer.from_merges(merges)
    released = [*range(256), *(256 + rank for rank in ranks), *range(151643, 151643 + len(ADDED_TOKENS))]
    cases = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
    assert len(cases) == 39
    for case in [*cases, {"text": "Hello world!", "ids": [9707, 1879, 0]}]:
        ids = subset.encode(case["text"], special=True)
        assert [released[i] for i in ids] == case["ids"], case["text"]
        assert subset.decode(ids, skip_special=False) == unicodedata.normalize("NFC", case["text"])


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    composed = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == composed
    assert tokenizer.decode(tokenizer.encode(text, special=True), skip_special=False) == composed


def test_user_text_never_becomes_an_added_token(tokenizer):
    first = tokenizer.pad_id
    for name, _ in ADDED_TOKENS:
        for text in (name, f"a {name} b", name * 3, f"<{name}>", name[:-1] + name):
            assert max(tokenizer.encode(text)) < first, text
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(name, special=True) == [tokenizer.token_id(name)]


def test_only_the_named_tokens_are_recognised(tokenizer):
    text = "<|box_start|>(1,2)<|box_end|><|im_end|><think>x"
    ids = tokenizer.encode(text, special={"<|box_start|>", "<|box_end|>"})
    assert [i for i in ids if i >= tokenizer.pad_id] == [tokenizer.token_id("<|box_start|>"), tokenizer.token_id("<|box_end|>")]
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.encode(text, special={name for name, _ in ADDED_TOKENS}) == tokenizer.encode(text, special=True)


def test_added_tokens_in_the_models_own_vocabulary_are_escaped_too():
    """Some tokenizers list their special tokens in the vocabulary and match whole words in it."""
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(symbols)} | {"<s>": 256}
    foreign = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    foreign.add_tokens([AddedToken("<s>", special=True, normalized=False)])
    loaded = Tokenizer._from_json(foreign.to_str(), None, "tokenizer.json")
    assert loaded.encode("<s>", special=True) == [256]
    assert 256 not in loaded.encode("<s>")


def test_decode_keeps_what_is_not_special(tokenizer):
    ids = tokenizer.encode("<|im_start|><think>a</think>b<|im_end|>", special=True)
    assert tokenizer.decode(ids) == "<think>a</think>b"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|><think>a</think>b<|im_end|>"
    assert tokenizer.decode([tokenizer.vocab_size + 5, *tokenizer.encode("x")]) == "x"


@pytest.mark.parametrize("skip_special", [True, False])
def test_streamed_text_is_the_decoded_text(tokenizer, skip_special):
    source = random.Random(0)
    for _ in range(150):
        text = "".join(source.choice(TEXTS) for _ in range(3))
        valid = tokenizer.encode(text, special=True)
        cut = valid[: source.randrange(len(valid) + 1)]
        noise = [source.randrange(tokenizer.vocab_size) for _ in range(12)]
        for ids in (valid, cut, noise):
            stream = DecodeStream(tokenizer, skip_special)
            pieces = [stream.step(i) for i in ids]
            assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special)


def test_a_split_character_comes_out_whole():
    plain = Tokenizer.from_merges([])
    stream = DecodeStream(plain)
    ids = plain.encode("a猫")
    assert len(ids) == 4
    assert [stream.step(i) for i in ids] == ["a", "", "", "猫"]
    assert stream.flush() == ""
    assert stream.step(ids[1]) == "" and stream.flush() == "\ufffd"


def test_every_way_to_load_gives_the_same_tokenizer(tokenizer, merges, tmp_path):
    tokenizer.save(tmp_path)
    saved = {path.name for path in tmp_path.iterdir()}
    assert saved == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    loaded = Tokenizer.load(tmp_path)
    assert same_tokenizer(loaded, tokenizer) and loaded.settings == tokenizer.settings

    (tmp_path / "tokenizer.json").unlink()
    assert Tokenizer.load(tmp_path) is None
    write_merges(tmp_path / "merges.txt", merges)
    assert same_tokenizer(Tokenizer.load(tmp_path), tokenizer)
    vocab = {tokenizer.full.id_to_token(i): i for i in range(256 + len(merges))}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    assert same_tokenizer(Tokenizer.load(tmp_path), tokenizer)


def test_settings_survive_loading_and_saving(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"chat_template": "{{ messages }}", "tokenizer_class": "Qwen2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    again = tmp_path / "again"
    again.mkdir()
    Tokenizer.load(tmp_path).save(again)
    assert json.loads((again / "tokenizer_config.json").read_text()) == settings
    special = json.loads((again / "special_tokens_map.json").read_text())
    assert special == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def test_read_merges_accepts_windows_ends_and_a_missing_header(merges, tmp_path):
    write_merges(tmp_path / "a", merges)
    write_merges(tmp_path / "b", merges, header="")
    (tmp_path / "c").write_bytes((tmp_path / "a").read_bytes().replace(b"\n", b"\r\n"))
    (tmp_path / "d").write_text("# #\n## ##\n")
    assert read_merges(tmp_path / "a") == read_merges(tmp_path / "b") == read_merges(tmp_path / "c") == merges
    assert read_merges(tmp_path / "d") == [("#", "#"), ("##", "##")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab', "tokenizer.json: not valid JSON"),
        ("tokenizer.json", b"[" * 100_000, "tokenizer.json: not valid JSON"),
        ("tokenizer.json", b"[1]", "tokenizer.json: found a JSON list, expected an object"),
        ("tokenizer.json", b"\xff\xfe\x00", "tokenizer.json: not UTF-8"),
        ("tokenizer.json", b"{}", "tokenizer.json: no BPE model"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {}}}', "tokenizer.json: no BPE model"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}', "tokenizer.json: damaged"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": 3}', "tokenizer.json: dam"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: not valid JSON"),
        ("merges.txt", b"#version: 0.2\na b c\n", "merges.txt: line 2 is 'a b c', expected two parts"),
        ("merges.txt", b"ab\n", "merges.txt: line 1 is 'ab'"),
        ("merges.txt", b"a zz\n", "merges.txt: not a byte-level BPE vocabulary"),
        ("vocab.json", b'{"a": 0}', "vocab.json: has no merges.txt beside it"),
        ("vocab.json merges.txt", b'{"a": 0, "b": 2}', "vocab.json: the ids are not 0 to 1, each once"),
        ("vocab.json merges.txt", b'{"a": 0, "b": 0}', "vocab.json: the ids are not 0 to 1, each once"),
        ("vocab.json merges.txt", b'{"a": "0"}', "vocab.json: the ids are not 0 to 0, each once"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    name, *others = name.split()
    (tmp_path / name).write_bytes(content)
    for other in others:
        (tmp_path / other).write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=re.escape(message)):
        Tokenizer.load(tmp_path)


def test_a_huge_file_is_refused_before_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "MAX_FILE_BYTES", 10)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match="tokenizer.json: the file has 13 bytes, expected at most 10"):
        Tokenizer.load(tmp_path)


def test_text_that_is_no_unicode_is_refused(tokenizer):
    for special in (False, True, {"<think>"}):
        with pytest.raises(UserError, match="found lone surrogates"):
            tokenizer.encode("a \ud800 b", special)
        with pytest.raises(UserError, match="found a NoneType"):
            tokenizer.encode(None, special)


def test_an_absent_token_is_named(tokenizer):
    with pytest.raises(UserError, match="tokenizer has no token '<|nothing|>'".replace("|", r"\|")):
        tokenizer.token_id("<|nothing|>")


def test_a_tokenizer_can_be_sent_to_worker_processes(tokenizer):
    """Copying goes through the same state as sending it to a data worker."""
    assert same_tokenizer(copy.deepcopy(tokenizer), tokenizer)
