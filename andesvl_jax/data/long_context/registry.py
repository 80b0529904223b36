"""The long-context families by name, and the one entry point that renders an example of a wanted length."""

import zlib
from collections.abc import Callable

import numpy as np

from andesvl_jax.data.examples import SPLITS, Example
from andesvl_jax.data.long_context import dialogue, lists, pictures, retrieval
from andesvl_jax.data.long_context.layout import Count, Plan, fill
from andesvl_jax.errors import UserError

LONG_TASKS: dict[str, Callable[[np.random.Generator, str, int], Plan]] = {
    "niah_single": retrieval.niah_single,
    "niah_multikey": retrieval.niah_multikey,
    "niah_multivalue": retrieval.niah_multivalue,
    "echo": retrieval.echo,
    "recite": retrieval.recite,
    "vt": retrieval.vt,
    "cwe": lists.cwe,
    "fwe": lists.fwe,
    "qa_two_hop": retrieval.qa_two_hop,
    "dialogue": dialogue.dialogue,
    "pages": pictures.pages,
    "which_picture": pictures.which_picture,
}
TEXT_TASKS = tuple(name for name in LONG_TASKS if name not in ("pages", "which_picture"))
MOST_TOKENS = 1 << 17
LENGTH_MARK = "@"  # between a family and its tokens: niah_single@2048


def render_long(family: str, seed: int, index: int, split: str, tokens: int, count: Count) -> Example:
    """Example `index` of a family, a context with several questions about different places: a pure function of its arguments.

    Args:
      tokens: what `count` gives for the example is at most this and at least 95 % of it.
      count: see `data.long_context.length`. The same example at another length, or counted otherwise, has the same facts and
        as many of the same questions as fit.
    Raises:
      UserError: a family that is not in LONG_TASKS, a split that is not in SPLITS, or a length that the family cannot have.
    """
    if family not in LONG_TASKS:
        raise UserError(f"long-context family: found {family!r}, expected one of {', '.join(LONG_TASKS)}")
    if split not in SPLITS:
        raise UserError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}")
    if not 0 < tokens <= MOST_TOKENS:
        raise UserError(f"tokens: found {tokens}, expected 1 to {MOST_TOKENS:,}.")
    rng = np.random.default_rng([seed, index, zlib.crc32(family.encode()), SPLITS.index(split)])
    try:
        return fill(LONG_TASKS[family](rng, split, tokens), tokens, count).example()
    except UserError as error:
        raise UserError(f"{family}{LENGTH_MARK}{tokens}: {error}") from error


def long_name(name: str) -> tuple[str, int] | None:
    """(family, tokens) of a name such as "niah_single@2048"; None for a name of something else.

    Raises UserError for an unknown family or a length that is no positive number.
    """
    family, mark, tokens = name.partition(LENGTH_MARK)
    if not mark:
        return None
    if family not in LONG_TASKS or not (len(tokens) < 8 and tokens.isdecimal() and 0 < int(tokens) <= MOST_TOKENS):
        raise UserError(
            f"{name!r} is no long-context source, expected FAMILY{LENGTH_MARK}TOKENS with one of {', '.join(LONG_TASKS)}."
        )
    return family, int(tokens)
