"""The text that `nano`'s tokenizer is trained on, and the training: byte-level BPE in the form of Qwen's tokenizer."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from andesvl_jax.data.english import general_text
from andesvl_jax.data.registry import TASKS, render
from andesvl_jax.data.sources import open_source
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.tokenizer import ADDED_TOKENS, SPLIT_PATTERN

EXAMPLES = 2000
VOCAB_SIZE = 4096
CAPITAL_RUN = re.compile(r"[A-Z]{2,}")
ADDED_NAME = re.compile("|".join(re.escape(name) for name, _ in ADDED_TOKENS))


def lower_capital_runs(text: str) -> str:
    """Lower-case every run of two or more capitals, so that none of them merges into one token.

    Words in pictures are then spelled letter by letter, and reading carries over to strings never seen.
    """
    return CAPITAL_RUN.sub(lambda run: run.group().lower(), text)


def corpus(seed: int, examples: int = EXAMPLES) -> Iterator[str]:
    """General English, then the questions and answers of `examples` training examples, added tokens cut out.

    Answers to `word` are left out: they are the strings that must stay spelled.
    """
    for text in general_text():
        yield lower_capital_runs(text)
    families = tuple(TASKS)
    for index in range(examples):
        for turn in render(families[index % len(families)], seed, index, "train").turns:
            answer = "" if turn.task == "word" else f"\n{turn.answer}"
            text = lower_capital_runs(f"{turn.question}{answer}\n")
            # Added tokens are cut out before BPE ever sees a text, so their names must not cost entries.
            yield from (piece for piece in ADDED_NAME.split(text) if piece)


def source_text(paths: Iterable[str], examples: int = EXAMPLES) -> Iterator[str]:
    """Questions and answers of `examples` records of each file, spread evenly over it, added tokens cut out."""
    for path in paths:
        source = open_source(path)
        for index in range(0, len(source), max(1, len(source) // examples)):
            for message in source[index]:
                content = message["content"]
                parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
                text = "".join(part["text"] for part in parts if part["type"] == "text")
                yield from (piece for piece in ADDED_NAME.split(lower_capital_runs(f"{text}\n")) if piece)


def train_tokenizer(texts: Iterable[str], path: str | Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Write a `tokenizer.json` of exactly `vocab_size` BPE entries followed by AndesVL's added tokens.

    Ids 0..255 are the bytes, `vocab_size`.. the added tokens. Raises UserError if the texts are too few for `vocab_size`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = {"add_prefix_space": False, "use_regex": False}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(**byte_level),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False, **byte_level)
    tokenizer.decoder = decoders.ByteLevel(**byte_level)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(f"tokenizer corpus: gave {tokenizer.get_vocab_size()} entries, expected {vocab_size}; add text")
    tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name, special in ADDED_TOKENS])
    tokenizer.save(str(path))
