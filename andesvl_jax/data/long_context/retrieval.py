"""Tasks that find facts between other facts: RULER's needles (niah), its variable tracking (vt), and look-ups in two hops.

Names and forms follow RULER (arXiv 2404.06654); several questions stand after one context, where RULER asks one. RULER begins the
answer with words that name what was asked for; here training says them, in `Turn.reply`.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from andesvl_jax.data.examples import draw_in_split, pick
from andesvl_jax.data.long_context.layout import Asked, Lines, questions_of, spread
from andesvl_jax.data.long_context.words import CITIES, NOUNS, noise, noun, number, person, two_nouns, unused

CODES = "Read the notes. Some of them hold codes."
CODE_OF = ("What is the code of {}?", "Which code does {} have?", "Give the code of {}.")
CODES_OF = ("What are all codes of {}?", "Which codes does {} have?", "Give all codes of {}.")
VARIABLES = "Read the notes. Some of them name variables."
NAME_VARIABLES = ("Which variables have the value {}?", "Name all variables with the value {}.", "What variables equal {}?")
PEOPLE = "Read the notes about people and their friends."
FRIEND_LIVES = ("In which city does the friend of {} live?", "Where does the friend of {} live?", "Name the city of {}'s friend.")
IN_ORDER = (
    "List all keys with their codes, in the order of the notes.",
    "Repeat every code with its key, from the first to the last.",
)
REVERSED = ("List all keys with their codes, the last one first.", "Repeat every code with its key, from the last to the first.")
WORDS = "Read the notes. One of them is a row of words and numbers."
FORWARDS = ("Repeat the row.", "Write the row down.", "What is the row of words and numbers?")
BACKWARDS = ("Repeat the row backwards.", "Write the row down from its end.", "What is the row, read from the end?")
MOST_ECHOED, ECHOED_EVERY = 16, 15  # words of echo; tokens of a context that make room for one
MOST_RECITED, RECITED_EVERY = 5, 64  # codes of recite; tokens of a context that make room for one
MOST_VALUES = 4  # of a key of niah_multivalue
MOST_LINKS = 3  # assignments of vt between a number and the last variable that has it
MOST_FACTS = 500  # that are not asked for; noise follows them, for words run out
Fact = tuple[tuple[str, ...], str]  # the words that were drawn; the text that decides the split
Filler = Iterator[tuple[str, ...]]


def niah_single(rng: np.random.Generator, split: str, tokens: int) -> Lines:
    """One code for each key that is asked for, among sentences about nothing: "The code of lamp is 4821."."""
    taken: set[str] = set()
    facts = [_code(rng, split, taken, noun) for _ in range(questions_of(rng))]
    return Lines("niah_single", CODES, _asked_codes(rng, facts, CODE_OF), _noise(rng), rng)


def niah_multikey(rng: np.random.Generator, split: str, tokens: int) -> Lines:
    """As niah_single with keys of two words, and every other line is such a code too: some share a word with a key asked for."""
    taken: set[str] = set()
    facts = [_code(rng, split, taken, two_nouns) for _ in range(questions_of(rng))]

    def others() -> Filler:
        for words, _ in facts * 2:
            yield _code_lines(_code(rng, split, taken, _near(words[0], int(rng.integers(2)))))
        for _ in range(MOST_FACTS):
            yield _code_lines(_code(rng, split, taken, two_nouns))
        yield from _noise(rng)

    return Lines("niah_multikey", CODES, _asked_codes(rng, facts, CODE_OF), others(), rng)


def niah_multivalue(rng: np.random.Generator, split: str, tokens: int) -> Lines:
    """As niah_single with 2 to 4 codes for a key, far from each other; other keys have codes too."""
    taken: set[str] = set()
    facts = [_code(rng, split, taken, noun, int(rng.integers(2, MOST_VALUES + 1))) for _ in range(questions_of(rng))]

    def others() -> Filler:
        for _ in range(len(NOUNS) // 3):
            yield _code_lines(_code(rng, split, taken, noun))
            yield (noise(rng),)
        yield from _noise(rng)

    return Lines("niah_multivalue", CODES, _asked_codes(rng, facts, CODES_OF), others(), rng)


def recite(rng: np.random.Generator, split: str, tokens: int) -> Lines:
    """As niah_single, but all keys with their codes are listed, once forwards and once backwards."""
    taken: set[str] = set()
    facts = [_code(rng, split, taken, noun) for _ in range(min(MOST_RECITED, max(2, tokens // RECITED_EVERY)))]
    pairs = [" ".join(words) for words, _ in facts]
    lines, fact = tuple(line for fact in facts for line in _code_lines(fact)), "; ".join(fact for _, fact in facts)
    asked = [
        Asked(pick(rng, IN_ORDER), ", ".join(pairs), lines, spread(rng, [len(facts)])[0], fact),
        Asked(pick(rng, REVERSED), ", ".join(reversed(pairs)), (), (), fact),
    ]
    return Lines("recite", CODES, asked, _noise(rng), rng)


def echo(rng: np.random.Generator, split: str, tokens: int) -> Lines:
    """A row of words and numbers among noise, to be repeated forwards and backwards: copying, with nothing to look up."""

    def draw(rng: np.random.Generator) -> tuple[str, ...]:
        length = min(MOST_ECHOED, max(4, tokens // ECHOED_EVERY))
        return tuple(noun(rng) if rng.random() < 0.6 else str(rng.integers(10, 100)) for _ in range(length))

    words, row = draw_in_split(draw, " ".join, rng, split)
    asked = [
        Asked(pick(rng, FORWARDS), row, (row,), (float(rng.random()),), row),
        Asked(pick(rng, BACKWARDS), " ".join(reversed(words)), (), (), row),
    ]
    return Lines("echo", WORDS, asked, _noise(rng), rng)


def vt(rng: np.random.Generator, split: str, tokens: int) -> Lines:
    """Chains of assignments: "Let lamp be 4821.", "Let stone be lamp."; asked are all variables with a value, in order."""
    taken: set[str] = set()
    facts = [_chain(rng, split, taken, int(rng.integers(1, MOST_LINKS + 1))) for _ in range(questions_of(rng))]

    def others() -> Filler:
        for _ in range(len(NOUNS) // 4):
            yield _chain_lines(_chain(rng, split, taken, int(rng.integers(2))))
            yield (noise(rng),)
        yield from _noise(rng)

    places = spread(rng, [len(words) - 1 for words, _ in facts])
    asked = [
        Asked(pick(rng, NAME_VARIABLES).format(fact[0][0]), ", ".join(fact[0][1:]), _chain_lines(fact), where, fact[1])
        for fact, where in zip(facts, places, strict=True)
    ]
    return Lines("vt", VARIABLES, asked, others(), rng)


def qa_two_hop(rng: np.random.Generator, split: str, tokens: int) -> Lines:
    """ "The friend of Anna Hill is Ben Stone." and "Ben Stone lives in Rome." stand apart; Anna's own city stands there too."""
    taken: set[str] = set()
    facts = [_friendship(rng, split, taken) for _ in range(questions_of(rng))]

    def others() -> Filler:
        for (one, friend, city), _ in facts:
            yield (_lives(one, unused(lambda rng: pick(rng, CITIES), rng, (city,))),)
            taken.add(third := unused(person, rng, taken))
            yield (_befriends(friend, third),)
        for _ in range(MOST_FACTS):
            (one, friend, city), _ = _friendship(rng, split, taken)
            yield (_befriends(one, friend),)
            yield (_lives(friend, city),)
        yield from _noise(rng)

    asked = []
    for ((one, friend, city), fact), places in zip(facts, spread(rng, [2] * len(facts)), strict=True):
        needles = [_befriends(one, friend), _lives(friend, city)]
        reply = " ".join(needles)
        if rng.random() < 0.5:
            needles.reverse()
        asked.append(Asked(pick(rng, FRIEND_LIVES).format(one), city, tuple(needles), places, fact, reply))
    return Lines("qa_two_hop", PEOPLE, asked, others(), rng)


def _noise(rng: np.random.Generator) -> Filler:
    while True:
        yield (noise(rng),)


def _near(key: str, kept: int) -> Callable[[np.random.Generator], str]:
    """Draws keys that share word `kept` with this one."""
    word = key.split()[kept]
    return lambda rng: f"{word} {noun(rng)}" if kept == 0 else f"{noun(rng)} {word}"


def _code(rng: np.random.Generator, split: str, taken: set[str], key: Callable[[np.random.Generator], str], values=1) -> Fact:
    """(key, value, ...), all of them new to `taken`."""

    def draw(rng: np.random.Generator) -> tuple[str, ...]:
        words = [unused(key, rng, taken)]
        for _ in range(values):
            words.append(unused(number, rng, taken, words))
        return tuple(words)

    return _in_split(draw, rng, split, taken)


def _code_lines(fact: Fact) -> tuple[str, ...]:
    key, *values = fact[0]
    return tuple(f"The code of {key} is {value}." if len(values) == 1 else f"One code of {key} is {value}." for value in values)


def _reply(fact: Fact) -> str:
    key, *values = fact[0]
    return f"The code{'s' * (len(values) > 1)} of {key} {'is' if len(values) == 1 else 'are'} {', '.join(values)}."


def _asked_codes(rng: np.random.Generator, facts: Sequence[Fact], wordings: Sequence[str]) -> list[Asked]:
    places = spread(rng, [len(words) - 1 for words, _ in facts])
    return [
        Asked(pick(rng, wordings).format(fact[0][0]), ", ".join(fact[0][1:]), _code_lines(fact), where, fact[1], _reply(fact))
        for fact, where in zip(facts, places, strict=True)
    ]


def _chain(rng: np.random.Generator, split: str, taken: set[str], links: int) -> Fact:
    """(value, variable, ...): the first variable has the value, each other one the variable before it."""

    def draw(rng: np.random.Generator) -> tuple[str, ...]:
        words = [unused(number, rng, taken)]
        for _ in range(links + 1):
            words.append(unused(noun, rng, taken, words))
        return tuple(words)

    return _in_split(draw, rng, split, taken)


def _chain_lines(fact: Fact) -> tuple[str, ...]:
    words = fact[0]
    return tuple(f"Let {variable} be {value}." for value, variable in zip(words, words[1:]))


def _friendship(rng: np.random.Generator, split: str, taken: set[str]) -> Fact:
    """(person, friend, city of the friend)."""

    def draw(rng: np.random.Generator) -> tuple[str, ...]:
        one = unused(person, rng, taken)
        return one, unused(person, rng, taken, (one,)), pick(rng, CITIES)

    return _in_split(draw, rng, split, taken)


def _befriends(one: str, other: str) -> str:
    return f"The friend of {one} is {other}."


def _lives(one: str, city: str) -> str:
    return f"{one} lives in {city}."


def _in_split(
    draw: Callable[[np.random.Generator], tuple[str, ...]], rng: np.random.Generator, split: str, taken: set[str]
) -> Fact:
    words, fact = draw_in_split(draw, " ".join, rng, split)
    taken.update(words)
    return words, fact
