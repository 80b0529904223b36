"""What training reads: a source has a length and gives record i as the messages of one conversation, pictures inside.

    len(source), source[i] -> [{"role": "user", "content": [{"type": "image", "image": X}, {"type": "text", ...}]}, ...]

Opening a source checks its structure and raises UserError for a file that is broken as a whole. `source[i]` raises UserError for
a record that nothing can be learned from: the pipeline skips it, counts it and tells the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from andesvl_jax.data.array_record import ArrayRecords
from andesvl_jax.data.conversations import Conversations
from andesvl_jax.data.examples import MANY, messages_of
from andesvl_jax.data.long_context.layout import Count
from andesvl_jax.data.long_context.registry import render_long
from andesvl_jax.data.registry import render
from andesvl_jax.data.tar import TarShard
from andesvl_jax.data.tsv import QuestionTable
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.chat import Message

ENDLESS = 1 << 40  # examples of a renderer, more than a run can draw


class Source(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> list[Message]: ...


@dataclass(frozen=True)
class Rendered:
    """Examples of a task family as a source; over the first `ramp` of them pictures fill up from one thing to many."""

    family: str
    seed: int
    split: str
    ramp: int = 0

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> list[Message]:
        return messages_of(render(self.family, self.seed, index, self.split, crowd_at(index, self.ramp)))


@dataclass(frozen=True)
class RenderedLong:
    """Examples of a long-context family as a source, each a whole conversation of at most `tokens` tokens by `count`."""

    family: str
    seed: int
    split: str
    tokens: int
    count: Count

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> list[Message]:
        return messages_of(render_long(self.family, self.seed, index, self.split, self.tokens, self.count))


def crowd_at(index: int, ramp: int) -> int:
    """How many things a picture may hold: one in the first third of the ramp, then more step by step."""
    if index >= ramp:
        return MANY
    return max(1, 1 + int((MANY - 1) * (3 * index - ramp) / (2 * ramp)))


READERS: dict[str, Callable[[str, str | None], Source]] = {
    ".json": Conversations,
    ".jsonl": Conversations,
    ".tsv": QuestionTable,
    ".tar": TarShard,
    ".array_record": ArrayRecords,
}


def open_source(path: str, image_root: str | None = None) -> Source:
    """Opens a file of records by its ending. Raises UserError for another ending, or a file that is broken as a whole."""
    reader = READERS.get(Path(path).suffix.lower())
    if reader is None:
        raise UserError(f"{path}: has ending {Path(path).suffix!r}, expected one of {', '.join(READERS)}.")
    return reader(path, image_root)
