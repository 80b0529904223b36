"""A tiny real tokenizer: byte-level BPE trained on a few lines, with AndesVL's split rule and added tokens."""

import json

import pytest
import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

from andesvl_jax.inputs.tokenizer import SPLIT_PATTERN, Tokenizer

LINES = [
    "user\nassistant\nsystem\n\n\nWhat is shown in the picture? A cat sits on the mat.",
    "It's 12345 + 67 = don't\tknow  \n\n  x, you are a GUI agent. Describe the image, please!",
    "描述这张图片。 这是一只猫。 请给出坐标。 世界你好",
    "<|im_start|> <img> <|vision_pad|> <think> <box> im_end vision_pad start end think",
] * 4


@pytest.fixture(scope="session")
def merges() -> list[tuple[str, str]]:
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=400, min_frequency=2, show_progress=False))
    return [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]


@pytest.fixture(scope="session")
def tokenizer(merges) -> Tokenizer:
    return Tokenizer.from_merges(merges)
