"""What a task renderer returns, and the rule that keeps validation content out of training.

The split is decided by content (what a picture shows), never by seed: a string of letters, a scene or a chart that
hashes into validation is drawn in validation only, whatever its font, colours or background.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from andesvl_jax.inputs.chat import Message

SPLITS = ("train", "validation")
VALIDATION_SHARE = 0.1
MANY = 6  # things in the fullest picture
LISTED_ALONE = 0.25  # share of the pictures whose list is asked for alone, as it is in the evaluation
T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `task` names the row of the results table it is scored in.

    depths: where in a long context what answers it begins, 0..1 each. reply: the sentence around the answer that training says,
    "" = the answer alone.
    """

    task: str
    question: str
    answer: str
    depths: tuple[float, ...] = ()
    reply: str = ""


@dataclass(frozen=True)
class Example:
    """Pictures (uint8 [height, width, 3]), the turns asked about them, and the canonical description of what is shown.

    context: text between the pictures and the first question; ends with a line break.
    """

    images: tuple[np.ndarray, ...]
    turns: tuple[Turn, ...]
    content: str
    context: str = ""


def messages_of(example: Example) -> list[Message]:
    """An example as a conversation: its pictures and its context stand before the first question."""
    messages = []
    for i, turn in enumerate(example.turns):
        pictures = [{"type": "image", "image": image} for image in example.images] if i == 0 else []
        question = (example.context if i == 0 else "") + turn.question
        content = [*pictures, {"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.reply or turn.answer}]
    return messages


def with_list(rng: np.random.Generator, turns: Sequence[Turn], listed: Turn) -> list[Turn]:
    """The turns and then the list of everything, which no other answer can lean on there; or the list alone."""
    return [listed] if rng.random() < LISTED_ALONE else [*turns, listed]


def in_validation(content: str) -> bool:
    """True for the ~10 % of content strings that belong to validation; depends on nothing but the string."""
    digest = hashlib.sha256(content.encode()).digest()
    return int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64


def draw_in_split(
    draw: Callable[[np.random.Generator], T], describe: Callable[[T], str], rng: np.random.Generator, split: str
) -> tuple[T, str]:
    """Draw until the content falls in `split`; returns what was drawn and its description."""
    while True:
        drawn = draw(rng)
        content = describe(drawn)
        if in_validation(content) == (split == "validation"):
            return drawn, content


def pick(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    """One element, uniformly; several times faster than `rng.choice` on a short sequence."""
    return choices[int(rng.integers(len(choices)))]
