"""The corpus and the tokenizer trained on it: sizes, spelling of capitals, round trips, order of added tokens."""

import json
import re
import unicodedata

import pytest
from tokenizers import Tokenizer

from andesvl_jax.data.corpus import VOCAB_SIZE, corpus, lower_capital_runs, train_tokenizer
from andesvl_jax.data.english import general_text
from andesvl_jax.data.registry import WORDINGS
from andesvl_jax.data.tasks_text import ENGLISH
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.tokenizer import ADDED_TOKENS


@pytest.fixture(scope="module")
def texts():
    return list(corpus(seed=0))


@pytest.fixture(scope="module")
def path(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(texts, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer.from_file(str(path))


def test_corpus_has_general_text_questions_and_no_capital_runs(texts):
    joined = "\n".join(texts)
    assert len(joined) > 500_000
    assert not re.search("[A-Z]{2}", joined)
    for task in ("word", "count", "chart"):
        assert any(wording.split("{")[0] in joined for wording in WORDINGS[task])
    assert len(list(general_text())) < len(texts)


def test_corpus_repeats_for_a_seed_and_differs_between_seeds():
    general = len(list(general_text()))
    first, again, other = (list(corpus(seed, 60))[general:] for seed in (3, 3, 4))
    assert first == again != other


def test_answers_to_word_questions_are_left_out(texts):
    questions = [text for text in texts if text.strip() in WORDINGS["word"]]
    assert len(questions) > 100


def test_capital_runs_are_lowered_and_single_capitals_kept():
    assert lower_capital_runs("Read WORD in an URL, Mr A") == "Read word in an url, Mr A"


def test_vocabulary_is_exact_and_added_tokens_follow_in_order(tokenizer):
    assert VOCAB_SIZE == 4096 and tokenizer.get_vocab_size() == 4122
    assert tokenizer.get_vocab_size(with_added_tokens=False) == 4096
    assert [tokenizer.id_to_token(4096 + index) for index in range(26)] == [name for name, _ in ADDED_TOKENS]
    assert [tokenizer.encode(name).ids for name, _ in ADDED_TOKENS] == [[4096 + index] for index in range(26)]


def test_special_flags_are_those_of_the_table(path):
    added = json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
    assert [(token["content"], token["special"]) for token in added] == list(ADDED_TOKENS)


def test_first_256_entries_are_the_bytes(tokenizer):
    assert all(len(tokenizer.id_to_token(index)) == 1 for index in range(256))


def test_capitals_and_digits_are_spelled(tokenizer):
    assert tokenizer.encode("WORD").tokens == ["W", "O", "R", "D"]
    assert tokenizer.encode("9074").tokens == list("9074")
    assert all(len(tokenizer.encode(word).ids) == len(word) for word in ENGLISH)
    assert not any(re.search("[A-Z]{2}", token) for token in tokenizer.get_vocab())


def test_common_words_of_the_questions_are_one_token(tokenizer):
    for word in ("colour", "shapes", "tallest", "screen", "yellow"):
        assert len(tokenizer.encode(f" {word}").ids) == 1


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!\n\n  indented\tline ",
        "naïve café Ω≈ç√",
        "请给出坐标为(12,345)的控件名称。",
        "🙂👩‍👩‍👧🇫🇮",
        "\u0000\u200b\ufffd",
        "<|im_start|>user\n<img><|image_pad|></img>What?<|im_end|>\n",
        "don't WE'LL 3.14",
        "עברית العربية हिन्दी",
        "\r\n\r\n",
    ],
)
def test_any_text_survives_encode_and_decode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_training_is_repeatable(texts, path, tmp_path):
    train_tokenizer(texts, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="tokenizer corpus.*expected 4096"):
        train_tokenizer(["a few words"], tmp_path / "tokenizer.json")
