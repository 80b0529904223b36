"""Tasks that count words over a whole list: RULER's common words (cwe) and frequent words (fwe), one list for each question.

Every count is exact: the words asked for stand oftener than any other of their list, in fwe each less often than the one before.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from andesvl_jax.data.examples import Turn, draw_in_split, pick
from andesvl_jax.data.long_context.layout import Sketch, questions_of
from andesvl_jax.data.long_context.words import NOUNS

OPENING = "Read the lists of words."
ASKED = 3  # words
COMMON = ("Which three words stand most often in list {}?", "Name the three most common words of list {}.")
FREQUENT = (
    "Which are the three most frequent words of list {}, the most frequent first?",
    "Name the three words that list {} holds most often, the most frequent first.",
)
EIGHTH, TWELFTH = 8, 12  # of a list: each common word; the least frequent of those asked for


@dataclass(frozen=True)
class WordList:
    """The words to find, in the order of the answer, the others by rank, the seed of their order, and the question."""

    asked: tuple[str, ...]
    others: tuple[str, ...]
    seed: int
    question: str


@dataclass(frozen=True)
class WordLists:
    """The plan of cwe (`ranked` false: the words asked for stand equally often) and of fwe."""

    task: str
    ranked: bool
    lists: tuple[WordList, ...]

    @property
    def questions(self) -> int:
        return len(self.lists)

    def sketch(self, questions: int, units: int) -> Sketch:
        """A unit is a word; the lists grow in turn."""
        context, starts = OPENING + "\n", []
        for number, words in enumerate(self.lists[:questions]):
            starts.append(len(context))
            context += f"List {number + 1}: {' '.join(self._words(words, units // questions + (number < units % questions)))}\n"
        ends = [*starts[1:], len(context)]
        turns = (
            Turn(self.task, words.question, ", ".join(words.asked), ((start + end) / 2 / len(context),))
            for words, start, end in zip(self.lists, starts, ends)
        )
        facts = sorted(" ".join(words.asked) for words in self.lists[:questions])
        return Sketch(context, tuple(turns), f"{self.task} " + "; ".join(facts))

    def _words(self, words: WordList, extra: int) -> list[str]:
        counts = self._counts(extra)
        found = [word for word, count in zip(words.asked, counts, strict=True) for _ in range(count)]
        rest = self._smallest() + extra - len(found)
        found += [words.others[i % len(words.others)] for i in range(rest)]
        return [found[i] for i in np.random.default_rng([words.seed, extra]).permutation(len(found))]

    def _counts(self, extra: int) -> tuple[int, ...]:
        """How often each word asked for stands in a list of `extra` words beyond the smallest; other words stand less often."""
        size = self._smallest() + extra
        if not self.ranked:
            return (max(2, size // EIGHTH),) * ASKED
        least, step = max(2, size // TWELFTH), max(1, size // (2 * TWELFTH))
        return least + 2 * step, least + step, least

    def _smallest(self) -> int:
        """Words of the shortest list: those asked for as often as they must be, and as many others once."""
        return (9 if self.ranked else 6) + ASKED


def cwe(rng: np.random.Generator, split: str, tokens: int) -> WordLists:
    """Three words stand equally often, and oftener than the others; the answer names them in alphabetical order."""
    return WordLists("cwe", False, _lists(rng, split, COMMON, sorted))


def fwe(rng: np.random.Generator, split: str, tokens: int) -> WordLists:
    """Three words stand often, each less often than the one before, and oftener than the others."""
    return WordLists("fwe", True, _lists(rng, split, FREQUENT, list))


def _lists(
    rng: np.random.Generator, split: str, wordings: tuple[str, ...], ordered: Callable[[list[str]], list[str]]
) -> tuple[WordList, ...]:
    def draw(rng: np.random.Generator) -> list[str]:
        words = [NOUNS[i] for i in rng.permutation(len(NOUNS))]
        return ordered(words[:ASKED]) + words[ASKED:]

    out = []
    for number in range(1, questions_of(rng) + 1):
        words, _ = draw_in_split(draw, lambda words: " ".join(words[:ASKED]), rng, split)
        question = pick(rng, wordings).format(number)
        out.append(WordList(tuple(words[:ASKED]), tuple(words[ASKED:]), int(rng.integers(1 << 32)), question))
    return tuple(out)
