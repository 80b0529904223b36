"""A conversation about who brings what, and its summary: a list of facts in alphabetical order, scored by facts.

People change their minds (what they say last holds), refuse, and talk about events that no question is about.
"""

from collections.abc import Iterator

import numpy as np

from andesvl_jax.data.examples import draw_in_split, pick
from andesvl_jax.data.long_context.layout import Asked, Lines, questions_of, spread
from andesvl_jax.data.long_context.words import FIRST_NAMES, carried, noise, unused

OPENING = "Read the conversation."
WHO_BRINGS = ("Who brings what to the {}?", "List who brings what to the {}.", "Sum up what everyone brings to the {}.")
EVENTS = ("party", "trip", "game", "show", "meeting", "class", "lunch", "dance", "fair", "picnic", "dinner", "camp")
MOST_ASKED = len(EVENTS) // 2  # the others are talked about too
FEWEST_FACTS, MOST_FACTS = 2, 4  # of an event
SHORT = 512  # tokens below which an event has no more than the fewest
CHANGES = 0.3  # share of facts of which something else was said before
SPEAKERS = 6
Summary = tuple[str, tuple[tuple[str, str], ...]]  # event; (who, thing) in alphabetical order


def dialogue(rng: np.random.Generator, split: str, tokens: int) -> Lines:
    """ "Anna: I bring the lamp to the party." for every fact; the answer is "Anna: lamp; Ben: stone"."""
    events = [EVENTS[i] for i in rng.permutation(len(EVENTS))]
    people = [FIRST_NAMES[i] for i in rng.permutation(len(FIRST_NAMES))[:SPEAKERS]]
    taken: set[str] = set()
    most = FEWEST_FACTS if tokens < SHORT else MOST_FACTS
    summaries = [_summary(rng, split, event, people, most, taken) for event in events[: min(questions_of(rng), MOST_ASKED)]]
    spoken = [[_said(rng, event, who, thing, taken) for who, thing in facts] for (event, facts), _ in summaries]

    asked = []
    groups = iter(spread(rng, [len(lines) for event in spoken for lines in event]))
    for ((event, facts), content), event_lines in zip(summaries, spoken, strict=True):
        placed = [pair for lines in event_lines for pair in zip(next(groups), lines, strict=True)]
        answer = "; ".join(f"{who}: {thing}" for who, thing in facts)
        needles, places = tuple(line for _, line in placed), tuple(place for place, _ in placed)
        asked.append(Asked(pick(rng, WHO_BRINGS).format(event), answer, needles, places, content))
    return Lines("dialogue", OPENING, asked, _small_talk(rng, events[MOST_ASKED:], people, taken), rng)


def _summary(
    rng: np.random.Generator, split: str, event: str, people: list[str], most: int, taken: set[str]
) -> tuple[Summary, str]:
    def draw(rng: np.random.Generator) -> Summary:
        who = sorted(people[i] for i in rng.permutation(SPEAKERS)[: int(rng.integers(FEWEST_FACTS, most + 1))])
        things: list[str] = []
        for _ in who:
            things.append(unused(carried, rng, taken, things))
        return event, tuple(zip(who, things, strict=True))

    summary, content = draw_in_split(draw, lambda s: f"{s[0]} " + ", ".join(" ".join(fact) for fact in s[1]), rng, split)
    taken.update(thing for _, thing in summary[1])
    return summary, content


def _said(rng: np.random.Generator, event: str, who: str, thing: str, taken: set[str]) -> tuple[str, ...]:
    """The lines that tell a fact, one or two."""
    if rng.random() >= CHANGES:
        return (f"{who}: I bring the {thing} to the {event}.",)
    taken.add(before := unused(carried, rng, taken))
    return f"{who}: I bring the {before} to the {event}.", f"{who}: No, I bring the {thing} to the {event}."


def _small_talk(rng: np.random.Generator, events: list[str], people: list[str], taken: set[str]) -> Iterator[tuple[str, ...]]:
    """Facts of events that no question is about, refusals of things that nobody brings, and talk about nothing."""
    other = frozenset(taken)
    bound: set[tuple[str, str]] = set()
    while True:
        who, event, kind = pick(rng, people), pick(rng, events), rng.random()
        if kind < 0.3 and (who, event) not in bound:
            bound.add((who, event))
            yield (f"{who}: I bring the {unused(carried, rng, other)} to the {event}.",)
        elif kind < 0.5:
            yield (f"{who}: I do not have the {unused(carried, rng, other)}.",)
        else:
            yield (f"{who}: {noise(rng)}",)
