"""The Qwen3 byte-level BPE tokenizer with AndesVL's added tokens, on top of the `tokenizers` library.

Ids 0..255 are the bytes in GPT-2 order, id 256+i is the i-th merge, then come the added tokens: the first N-256 merges are
therefore a valid smaller tokenizer. Text from users is encoded so that nothing in it can become an added token.
"""

import functools
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from andesvl_jax.errors import UserError

SPLIT_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# (token, special) in id order, 151643 first in the releases; the last twelve survive decode(skip_special=True).
ADDED_TOKENS: tuple[tuple[str, bool], ...] = (
    ("<|endoftext|>", True),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    ("<|object_ref_start|>", True),
    ("<|object_ref_end|>", True),
    ("<|box_start|>", True),
    ("<|box_end|>", True),
    ("<|quad_start|>", True),
    ("<|quad_end|>", True),
    ("<img>", True),
    ("</img>", True),
    ("<|vision_pad|>", True),
    ("<|image_pad|>", True),
    ("<|video_pad|>", True),
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<|fim_prefix|>", False),
    ("<|fim_middle|>", False),
    ("<|fim_suffix|>", False),
    ("<|fim_pad|>", False),
    ("<|repo_name|>", False),
    ("<|file_sep|>", False),
    ("<tool_response>", False),
    ("</tool_response>", False),
    ("<think>", False),
    ("</think>", False),
)

MAX_FILE_BYTES = 100_000_000  # the released tokenizer.json has 11 MB
_NAMED = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back. Ids are Python ints below `vocab_size`.

    `full` knows the added tokens; `plain` is the same BPE without any, so what it encodes is text and nothing else.
    `settings` is the content of `tokenizer_config.json`, written back by `save`.
    """

    full: tokenizers.Tokenizer
    plain: tokenizers.Tokenizer
    settings: dict[str, Any]

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer | None":
        """Reads `tokenizer.json`, else `vocab.json` + `merges.txt`, else `merges.txt` alone; None where there is none of them.

        Raises:
          UserError: a file that is damaged, larger than MAX_FILE_BYTES, or no BPE tokenizer.
        """
        directory = Path(directory)
        settings_path = directory / "tokenizer_config.json"
        settings = _parse_object(_read(settings_path), settings_path) if settings_path.is_file() else None
        json_path, merges_path, vocab_path = (directory / name for name in ("tokenizer.json", "merges.txt", "vocab.json"))
        if json_path.is_file():
            return cls._from_json(_read(json_path), settings, json_path)
        if not merges_path.is_file():
            if vocab_path.is_file():
                raise UserError(f"{vocab_path}: has no merges.txt beside it, expected both files, or tokenizer.json.")
            return None
        vocab = _parse_object(_read(vocab_path), vocab_path) if vocab_path.is_file() else None
        return cls.from_merges(read_merges(merges_path), vocab, settings, source=vocab_path if vocab else merges_path)

    @classmethod
    def from_merges(
        cls,
        merges: Sequence[tuple[str, str]],
        vocab: dict[str, int] | None = None,
        settings: dict[str, Any] | None = None,
        source: str | Path = "merges",
    ) -> "Tokenizer":
        """Byte-level BPE of these merges, in order of rank, followed by ADDED_TOKENS. `source` names them in errors.

        Raises:
          UserError: a merge of parts that are not in the vocabulary before it, or ids that are not 0, 1, 2, ...
        """
        if vocab is None:
            vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
            for rank, (left, right) in enumerate(merges):
                vocab.setdefault(left + right, 256 + rank)
        if not all(type(i) is int for i in vocab.values()) or sorted(vocab.values()) != list(range(len(vocab))):
            # the added tokens come next; with gaps or doubles they would share ids with text
            raise UserError(f"{source}: the ids are not 0 to {len(vocab) - 1}, each once; expected a complete vocabulary.")
        try:
            full = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{source}: not a byte-level BPE vocabulary ({error}).") from error
        full.normalizer = normalizers.NFC()
        full.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        full.decoder = decoders.ByteLevel()
        full.add_tokens([AddedToken(name, special=special, normalized=False) for name, special in ADDED_TOKENS])
        return cls._from_json(full.to_str(), settings, source)

    @classmethod
    def _from_json(cls, text: str, settings: dict[str, Any] | None, source: str | Path) -> "Tokenizer":
        raw = _parse_object(text, source)
        model, added = raw.get("model"), raw.get("added_tokens", [])
        if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
            raise UserError(f"{source}: no BPE model in it; expected a tokenizer of that kind.")
        try:
            names = {token["content"] for token in added}
            full = tokenizers.Tokenizer.from_str(text)
            # Without its added tokens, in the vocabulary too: some tokenizers list them there, where they could still be matched.
            vocab = {token: i for token, i in model["vocab"].items() if token not in names}
            bare = raw | {"added_tokens": [], "post_processor": None, "model": model | {"vocab": vocab}}
            plain = tokenizers.Tokenizer.from_str(json.dumps(bare))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{source}: damaged tokenizer ({error}).") from error
        for tokenizer in (full, plain):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        return cls(full, plain, settings or _default_settings(full))

    def encode(self, text: str, special: bool | Collection[str] = False) -> list[int]:
        """Ids of a text; no bos or eos is added.

        Args:
          special: which added tokens written in the text are real: none (text from users; they are tokenised as the characters
            they are), all (templates), or these names.
        Raises:
          UserError: the text holds lone surrogates, which no encoding can represent.
        """
        try:
            if special is True:
                return self.full.encode(text, add_special_tokens=False).ids
            if special is False:
                return self.plain.encode(text, add_special_tokens=False).ids
            return self._encode_named(text, frozenset(special))
        except TypeError as error:
            found = "lone surrogates" if isinstance(text, str) else f"a {type(text).__name__}"
            raise UserError(f"text to encode: found {found}, expected a string of valid Unicode.") from error

    def _encode_named(self, text: str, names: frozenset[str]) -> list[int]:
        pieces = _splitter(names).split(text)
        ids: list[int] = []
        for i, piece in enumerate(pieces):  # odd pieces are the names themselves
            if i % 2:
                ids.append(self.token_id(piece))
            elif piece:
                ids += self.plain.encode(piece, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary (embedding padding) vanish.

        `skip_special` drops <|im_end|> and the like, not <think> and the other added tokens that are not special.
        """
        return self.full.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token_id(self, name: str) -> int:
        """Id of a token. Raises UserError if the vocabulary has none of that name."""
        found = self.full.token_to_id(name)
        if found is None:
            raise UserError(f"tokenizer has no token {name!r}; expected a vocabulary with AndesVL's added tokens.")
        return found

    @functools.cached_property
    def image_token_id(self) -> int:
        """Placeholder of one visual token."""
        return self.token_id("<|vision_pad|>")

    @functools.cached_property
    def image_start_id(self) -> int:
        return self.token_id("<img>")

    @functools.cached_property
    def image_end_id(self) -> int:
        return self.token_id("</img>")

    @functools.cached_property
    def im_start_id(self) -> int:
        return self.token_id("<|im_start|>")

    @functools.cached_property
    def im_end_id(self) -> int:
        return self.token_id("<|im_end|>")

    @functools.cached_property
    def pad_id(self) -> int:
        return self.token_id("<|endoftext|>")

    @functools.cached_property
    def vocab_size(self) -> int:
        """Ids in use, added tokens included; the embedding may have more rows."""
        return self.full.get_vocab_size(with_added_tokens=True)

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` into an existing directory."""
        directory = Path(directory)
        special = {name: self.settings[name] for name in ("bos_token", "eos_token", "pad_token") if self.settings.get(name)}
        (directory / "tokenizer.json").write_text(self.full.to_str(pretty=True), encoding="utf-8")
        _write_json(directory / "tokenizer_config.json", self.settings)
        _write_json(directory / "special_tokens_map.json", special)


class DecodeStream:
    """Decodes ids one at a time: characters come out as soon as all their bytes are there.

    The texts of all steps and of `flush` together are `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._stream = decoders.DecodeStream(skip_special_tokens=skip_special)
        self._pending: list[int] = []

    def step(self, token_id: int) -> str:
        """Text that this id completes, "" while a character is incomplete."""
        self._pending.append(int(token_id))
        text = self._stream.step(self._tokenizer.full, int(token_id))
        if text is None:
            return ""
        self._pending.clear()
        return text

    def flush(self) -> str:
        """Text of what is still incomplete, at the end of a generation."""
        text = self._tokenizer.decode(self._pending, self._skip_special)
        self._pending.clear()
        return text


def read_merges(path: str | Path) -> list[tuple[str, str]]:
    """The merges of a `merges.txt`, in order of rank.

    Raises:
      UserError: the file is too large, no UTF-8, or a line is not two parts separated by one space.
    """
    lines = _read(Path(path)).split("\n")  # not splitlines: it also splits at characters that may be part of a merge
    merges = []
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise UserError(f"{path}: line {number} is {line[:80]!r}, expected two parts separated by one space.")
        merges.append((parts[0], parts[1]))
    return merges


@functools.lru_cache(maxsize=64)
def _splitter(names: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def _default_settings(full: tokenizers.Tokenizer) -> dict[str, Any]:
    """What `transformers` needs to read the saved files through its generic tokenizer class."""
    added = full.get_added_tokens_decoder()
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(i): {flag: getattr(token, flag) for flag in flags} for i, token in sorted(added.items())},
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
        **{key: name for key, name in _NAMED.items() if full.token_to_id(name) is not None},
    }


def _read(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise UserError(f"{path}: the file has {size:,} bytes, expected at most {MAX_FILE_BYTES:,}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from error


def _parse_object(text: str, source: str | Path) -> dict[str, Any]:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise UserError(f"{source}: found a JSON {type(raw).__name__}, expected an object.")
    return raw


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
