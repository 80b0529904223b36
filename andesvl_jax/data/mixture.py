"""Which examples a run sees, and in which order: shares of the sources, their limits, the order of the seed."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import grain
import numpy as np

from andesvl_jax.data.long_context.layout import Count
from andesvl_jax.data.long_context.registry import LENGTH_MARK, TEXT_TASKS, long_name
from andesvl_jax.data.registry import TASKS
from andesvl_jax.data.sources import Rendered, RenderedLong, open_source
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.chat import Message

# Factor on the sides of a picture, drawn anew for every example (the release's training utilities have these four draws).
RESIZES: dict[str, Callable[[np.random.Generator], float]] = {
    "none": lambda rng: 1.0,
    "slight": lambda rng: rng.uniform(0.8, 1.2),
    "wide": lambda rng: rng.uniform(0.5, 2.0),
    "beta": lambda rng: 0.5 + 1.5 * rng.beta(2, 5),
}


@dataclass(frozen=True)
class Mixture:
    """Share of each task family, long-context family at a length (niah_single@2048) or file; those with weight 0 are left out.

    Raises:
      UserError: a name that no source has, or a value that no mixture could be made with.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(TASKS, 1.0))
    ramps: Mapping[str, int] = field(default_factory=dict)  # family -> examples over which its pictures fill up to many things
    split: str = "train"
    seed: int = 0
    files: Mapping[str, str] = field(default_factory=dict)  # name of a source -> file, see `data.sources`
    image_root: str | None = None  # folder of the pictures of conversation files; None: each file's own
    temperature: float = 1.0  # shares are weight^(1/temperature): above 1 flatter, as is usual with weights = record counts
    limits: Mapping[str, int] = field(default_factory=dict)  # source -> most records of it, picked by the seed
    resize: str = "none"  # name in RESIZES
    max_bad: float = 0.01  # share of bad records at which the run stops, of all that were drawn (at least 1,000 count)
    shards: int = 1  # packers that the order is dealt to: a divisor of budget.rows, a multiple of the hosts, fixed for a run

    def __post_init__(self):
        unknown = sorted(name for name in set(self.weights) - set(TASKS) - set(self.files) if long_name(name) is None)
        if unknown:
            known = ", ".join((*TASKS, *self.files))
            raise UserError(f"data.weights names {unknown[0]!r}, expected families among {known}, or FAMILY{LENGTH_MARK}TOKENS.")
        taken = sorted(set(self.files) & set(TASKS))
        if taken:
            raise UserError(f"data.files names {taken[0]!r}, which is a task family; expected another name.")
        for name in ("limits", "ramps"):
            if unweighted := sorted(set(getattr(self, name)) - set(self.weights)):
                raise UserError(f"data.{name} names {unweighted[0]!r}, expected one of {', '.join(self.weights)}.")
        if not any(weight > 0 for weight in self.weights.values()):
            raise UserError(
                f"data.weights is {dict(self.weights)}: the dataset is empty, expected a positive weight for some source."
            )
        if self.resize not in RESIZES:
            raise UserError(f"data.resize is {self.resize!r}, expected one of {', '.join(RESIZES)}.")
        long = filter(None, (long_name(name) for name in self.weights if name not in self.files))
        pictures = [family for family, _ in long if family not in TEXT_TASKS]
        if pictures and self.resize != "none":
            raise UserError(f"data.resize is {self.resize!r}, which changes the length of {pictures[0]}; expected 'none'.")
        ranges = {"temperature": (1e-3, math.inf), "max_bad": (0, 1), "shards": (1, math.inf)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"data.{name} is {getattr(self, name)}, expected at least {low} and at most {high}.")
        if small := [name for name, limit in self.limits.items() if limit < 1]:
            raise UserError(f"data.limits[{small[0]!r}] is {self.limits[small[0]]}, expected at least 1.")


@dataclass(frozen=True)
class Bad:
    """Stands for a record that nothing can be learned from."""

    reason: str  # names the file and the record


def examples(mixture: Mixture, count: Count | None = None) -> grain.MapDataset[list[Message] | Bad]:
    """An endless random-access dataset of conversations: element i is a pure function of (mixture, the files, i).

    A file is gone through whole before any of its records comes again, in another order each time. `count` is what the lengths
    of long-context families are measured with; without it those are refused.
    """
    weights = {name: weight ** (1 / mixture.temperature) for name, weight in mixture.weights.items() if weight > 0}
    return grain.MapDataset.mix([_records(mixture, name, count) for name in weights], list(weights.values()))


def _records(mixture: Mixture, name: str, count: Count | None) -> grain.MapDataset:
    limit = mixture.limits.get(name)
    if name not in mixture.files:
        source = _rendered(mixture, name, count)
        order = grain.MapDataset.range(len(source) if limit is None else limit).repeat()
    else:
        source = open_source(mixture.files[name], mixture.image_root)
        kept = np.random.default_rng(mixture.seed).permutation(len(source))[:limit]
        order = grain.MapDataset.source(np.sort(kept)).shuffle(seed=mixture.seed).repeat()

    def read(index: int) -> list[Message] | Bad:
        try:
            return source[int(index)]
        except (UserError, OSError) as error:  # OSError: the file vanished
            return Bad(str(error))

    return order.map(read)


def _rendered(mixture: Mixture, name: str, count: Count | None) -> Rendered | RenderedLong:
    if name in TASKS:
        return Rendered(name, mixture.seed, mixture.split, mixture.ramps.get(name, 0))
    if count is None:
        raise UserError(f"data.weights names {name!r}, whose length needs the model's tokenizer; expected it beside the mixture.")
    family, tokens = long_name(name)
    return RenderedLong(family, mixture.seed, mixture.split, tokens, count)
