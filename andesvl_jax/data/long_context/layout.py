"""From a plan to an example of a wanted length: as much filler as fits, then a divider to the token.

A family draws a plan: questions, the facts they need, endless filler. `fill` finds the largest sketch of it that a `Count` says
fits. The same example at another length asks the same questions about the same facts among more or less filler.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from andesvl_jax.data.examples import Example, Turn
from andesvl_jax.errors import UserError

LEAST_FILL = 0.95  # of the tokens asked for
FEWEST_QUESTIONS, MOST_QUESTIONS = 4, 8  # of a context; as few as MUST_FIT where a short one cannot hold more
MUST_FIT = 2
MOST_STARS = 32  # of the divider; no line of filler is longer


@dataclass(frozen=True)
class Sketch:
    """An example before its pictures are painted: `sizes` are their (width, height) in pixels."""

    context: str
    turns: tuple[Turn, ...]
    content: str
    sizes: tuple[tuple[int, int], ...] = ()
    paint: Callable[[], tuple[np.ndarray, ...]] = tuple

    def example(self) -> Example:
        return Example(self.paint(), self.turns, self.content, self.context)


Count = Callable[[Sketch], float]  # tokens of a sketch's prompt; infinite where it cannot be shown as it is


class Plan(Protocol):
    """What a family draws: `questions` at most, and a sketch of any number of units (lines, words, rows of pixels)."""

    questions: int

    def sketch(self, questions: int, units: int) -> Sketch: ...


@dataclass(frozen=True)
class Asked:
    """A question with the lines that answer it, each at a place in 0..1 of the context, and the fact that decides the split.

    reply: see `Turn`.
    """

    question: str
    answer: str
    needles: tuple[str, ...]
    places: tuple[float, ...]
    fact: str
    reply: str = ""


class Lines:
    """A plan of one line after the other; `filler` gives endless lines, each of which stands at a random place.

    Lines of one group (a chain of assignments, a change of mind) keep their order: `filler` yields such a group as a tuple.
    """

    def __init__(
        self, task: str, opening: str, asked: Sequence[Asked], filler: Iterator[tuple[str, ...]], rng: np.random.Generator
    ):
        self.questions = len(asked)
        self._task, self._opening, self._asked, self._filler, self._rng = task, opening, tuple(asked), filler, rng
        self._drawn: list[tuple[float, str]] = []

    def sketch(self, questions: int, units: int) -> Sketch:
        asked = self._asked[:questions]
        placed = [
            (place, line, number) for number, a in enumerate(asked) for place, line in zip(a.places, a.needles, strict=True)
        ]
        placed += [(place, line, -1) for place, line in self._lines(units)]
        starts: list[list[int]] = [[] for _ in asked]
        context = self._opening + "\n"
        for _, line, number in sorted(placed, key=lambda entry: entry[0]):
            if number >= 0:
                starts[number].append(len(context))
            context += line + "\n"
        turns = (
            Turn(self._task, a.question, a.answer, tuple(start / len(context) for start in found), a.reply)
            for a, found in zip(asked, starts, strict=True)
        )
        return Sketch(context, tuple(turns), f"{self._task} " + "; ".join(sorted(a.fact for a in asked)))

    def _lines(self, number: int) -> list[tuple[float, str]]:
        while len(self._drawn) < number:
            group = next(self._filler)
            self._drawn += zip(np.sort(self._rng.random(len(group))).tolist(), group, strict=True)
        return self._drawn[:number]


def questions_of(rng: np.random.Generator) -> int:
    return int(rng.integers(FEWEST_QUESTIONS, MOST_QUESTIONS + 1))


def spread(rng: np.random.Generator, groups: Sequence[int]) -> list[tuple[float, ...]]:
    """For groups of so many needles their places in 0..1, ascending in a group: one in each of sum(groups) equal parts."""
    total = sum(groups)
    places = ((rng.permutation(total) + rng.random(total)) / total).tolist()
    out = []
    for size in groups:
        out.append(tuple(sorted(places[:size])))
        places = places[size:]
    return out


def fill(plan: Plan, tokens: int, count: Count) -> Sketch:
    """The largest sketch of at most `tokens` tokens, at least LEAST_FILL of them, with as many questions as fit.

    Raises:
      UserError: not even MUST_FIT questions fit, or the plan cannot be made so long.
    """
    questions = next((n for n in range(plan.questions, MUST_FIT - 1, -1) if count(plan.sketch(n, 0)) <= tokens), 0)
    if questions == 0 and math.isinf(count(plan.sketch(MUST_FIT, 0))):
        raise UserError("the smallest pictures would be shrunk; expected a larger max_size of the image processor.")
    if questions == 0:
        raise UserError(f"{tokens} tokens are too few for {MUST_FIT} questions with what they ask about.")
    sketch = largest(lambda units: plan.sketch(questions, units), tokens, count)
    sketch = _divided(sketch, tokens, count) if sketch.context else sketch
    if (size := count(sketch)) < LEAST_FILL * tokens:
        raise UserError(
            f"{tokens} tokens are too many: the longest example has {size:,}; expected a larger max_size of the image processor."
        )
    return sketch


def largest(sketch_of: Callable[[int], Sketch], tokens: int, count: Count) -> Sketch:
    """The sketch of the most units that fits: a search that guesses by tokens per unit and halves where the guess is no help."""
    low, high, best = 0, tokens, sketch_of(0)
    first = at_low = count(best)
    per_unit = 8.0  # a guess that the first look replaces
    while high - low > 1:
        guess = low + int((tokens - at_low) / per_unit)
        middle = min(max(guess, low + 1), high - 1)
        found = sketch_of(middle)
        size = count(found)
        if size <= tokens:
            low, at_low, best = middle, size, found
        else:
            high = middle
        # a sketch that cannot be shown says nothing about tokens per unit: look half-way next
        slope = 2 * (tokens - at_low) / (middle - low) if math.isinf(size) else (size - first) / middle
        per_unit = max(slope, 1e-3)
    return best


def _divided(sketch: Sketch, tokens: int, count: Count) -> Sketch:
    """The sketch with a last line of asterisks, about one token each, that takes up what is left."""
    left = tokens - int(count(sketch))
    for stars in range(min(left, MOST_STARS), 0, -1):
        divided = replace(sketch, context=sketch.context + " ".join("*" * stars) + "\n")
        if count(divided) <= tokens:
            return divided
    return sketch
