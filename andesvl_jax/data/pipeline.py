"""Grain pipeline: conversations -> samples -> packed batches, with a state small enough to checkpoint.

The endless order of examples is dealt to `shards` packers: shard s takes examples s, s + shards, ... and fills its own rows of
every batch. A host works for some of the shards, so the number of hosts changes no batch, only who makes which rows.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from grain import experimental as grain_experimental
from PIL import Image

from andesvl_jax.data.best_fit import next_row
from andesvl_jax.data.long_context.length import conversation_tokens
from andesvl_jax.data.mixture import RESIZES, Bad, Mixture, examples
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.chat import Message, images_of, render_training
from andesvl_jax.inputs.image import MAX_PIXELS, ImageProcessor, ImageSource, open_image, prepare_image
from andesvl_jax.inputs.packing import Batch, Budget, Sample, assemble, make_sample, over, sizes
from andesvl_jax.inputs.tokenizer import Tokenizer

LOOK_AHEAD = 32  # samples of a shard that a row is chosen from; from 16 to 64 rows fill by 1 % more (benchmarks/packing.py)
THREADS = 2  # that prepare samples of a shard
AHEAD = 2  # batches that a process is ahead by
FEW = 1000  # drawn examples below which the share of bad ones is taken of this number

Unit = Sample | tuple[Sample, ...]  # what stays together in one row: a conversation, or both answers of a preference pair


def to_sample(
    messages: list[Message], tokenizer: Tokenizer, processor: ImageProcessor, average="token", scale: float = 1.0
) -> Sample:
    """One conversation with its pictures, their sides times `scale`, prepared and its answers supervised."""
    pictures = images_of(messages)
    if scale != 1:
        pictures = [scaled(picture, scale) for picture in pictures]
    prepared = [prepare_image(picture, processor) for picture in pictures]
    ids, supervised = render_training(messages, tokenizer, [p.visual_tokens for p in prepared])
    return make_sample(ids, supervised, prepared, tokenizer.image_token_id, average)


def scaled(picture: ImageSource, scale: float) -> Image.Image:
    """The picture with both sides times `scale`, at least 1 pixel and at most MAX_PIXELS in all."""
    image = open_image(picture)
    scale = min(scale, (MAX_PIXELS / (image.width * image.height)) ** 0.5)
    return image.resize([max(1, int(side * scale)) for side in image.size], Image.Resampling.BICUBIC)


def samples_of(
    mixture: Mixture, tokenizer: Tokenizer, processor: ImageProcessor, average="token"
) -> grain.MapDataset[Sample | Bad]:
    """The mixture's examples as samples; example i is resized by a factor that depends on (mixture, i) alone."""

    def prepare(index: int, messages: list[Message] | Bad) -> Sample | Bad:
        if isinstance(messages, Bad):
            return messages
        try:
            scale = RESIZES[mixture.resize](np.random.default_rng([mixture.seed, index]))
            return to_sample(messages, tokenizer, processor, average, scale)
        except UserError as error:
            return Bad(f"example {index}: {error}")

    return examples(mixture, conversation_tokens(tokenizer, processor)).map_with_index(prepare)


class PackedBatches(grain.IterDataset[Batch]):
    """Packs an endless MapDataset of units, or of Bad ones, into batches of one static shape.

    Args:
      budget: of the whole batch; a host makes the rows of its shards, `budget.rows` / `hosts` of them.
      shards: packers of the whole batch. host, hosts: this process's number and their count.
      max_bad: share of bad units at which the iterator raises UserError.
    """

    def __init__(
        self, units: grain.MapDataset[Unit | Bad], budget: Budget, patch_features: int, shards=1, host=0, hosts=1, max_bad=0.01
    ):  # fmt: skip
        super().__init__()
        if budget.rows % shards:
            raise UserError(f"data.shards is {shards}, expected a divisor of budget.rows = {budget.rows}.")
        if shards % hosts:
            raise UserError(f"data.shards is {shards}, expected a multiple of the number of hosts times workers, {hosts}.")
        self.units, self.budget, self.patch_features, self.shards, self.max_bad = units, budget, patch_features, shards, max_bad
        self.own = range(host * shards // hosts, (host + 1) * shards // hosts)

    def __iter__(self) -> "PackedIterator":
        return PackedIterator(self)


class PackedIterator(grain.DatasetIterator[Batch]):
    """State: of each shard the number of examples drawn, those of them that still wait for a row, and how many were bad."""

    def __init__(self, dataset: PackedBatches):
        super().__init__()
        self._shards = {str(s): _Shard(dataset.units[s :: dataset.shards], dataset.budget, dataset.max_bad) for s in dataset.own}
        self._rows_per_shard = dataset.budget.rows // dataset.shards
        rows = self._rows_per_shard * len(self._shards)
        self._budget, self._patch_features = Budget(rows, *dataset.budget.sizes), dataset.patch_features

    def __next__(self) -> Batch:
        rows = [shard.next_row() for shard in self._shards.values() for _ in range(self._rows_per_shard)]
        return assemble(rows, self._budget, self._patch_features)

    def get_state(self) -> dict[str, dict[str, Any]]:
        return {name: shard.get_state() for name, shard in self._shards.items()}

    def set_state(self, state: dict[str, dict[str, Any]]) -> None:
        """Raises UserError for a state that lacks one of this host's shards; those of other hosts are ignored."""
        missing = [name for name in self._shards if name not in state]
        if missing:
            raise UserError(
                f"the data state has shards {', '.join(state)}, expected {missing[0]} too: join the states of all hosts, and "
                "keep data.shards as it was."
            )
        for name, shard in self._shards.items():
            shard.set_state(state[name])


def join_states(states: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """One state that any host of any number of hosts can start from, made of those of all hosts of a run."""
    return {shard: place for state in states for shard, place in state.items()}


class PackedByProcesses(grain.IterDataset[Batch]):
    """The same batches, each part of their rows made by a process of its own.

    Args:
      parts: as one process would make them each; their shards are different ones.
    """

    def __init__(self, parts: Sequence[PackedBatches]):
        super().__init__()
        self.parts = parts

    def __iter__(self) -> "_JoinedIterator":
        return _JoinedIterator(self.parts)


class _JoinedIterator(grain.DatasetIterator[Batch]):
    """Rows of all parts, side by side. State: that of the parts, joined."""

    def __init__(self, parts: Sequence[PackedBatches]):
        super().__init__()
        self._parts = parts
        self._state: dict[str, dict[str, Any]] | None = None
        self._running: list[grain.DatasetIterator[tuple[Batch, dict[str, Any]]]] = []

    def __next__(self) -> Batch:
        if not self._running:
            if not flags.FLAGS.is_parsed():  # Grain asks them when it starts a process
                flags.FLAGS.mark_as_parsed()
            alone = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=AHEAD)
            self._running = [iter(_Told(part, self._state).mp_prefetch(alone)) for part in self._parts]
        with ThreadPoolExecutor(len(self._running)) as pool:  # a process starts when it is first asked, all at once here
            rows, states = zip(*pool.map(next, self._running))
        self._state = join_states(states)
        return jax.tree.map(lambda *x: np.concatenate(x), *rows)

    def get_state(self) -> dict[str, dict[str, Any]]:
        return join_states(iter(part).get_state() for part in self._parts) if self._state is None else self._state

    def set_state(self, state: dict[str, dict[str, Any]]) -> None:
        """Raises UserError as `PackedIterator.set_state`, with the next batch."""
        self.close()
        self._state = state

    def close(self) -> None:
        for part in self._running:
            part.close()
        self._running = []


class _Told(grain.IterDataset):
    """(batch, state after it) of a packer that begins at a state."""

    def __init__(self, packed: PackedBatches, start: dict[str, Any] | None):
        super().__init__()
        self._packed, self._start = packed, start

    def __iter__(self) -> "_ToldIterator":
        packed = iter(self._packed)
        if self._start is not None:
            packed.set_state(self._start)
        return _ToldIterator(packed)


class _ToldIterator(grain.DatasetIterator):
    """Its own state is not asked for: it is in what it gives."""

    def __init__(self, packed: PackedIterator):
        super().__init__()
        self._packed = packed

    def __next__(self) -> tuple[Batch, dict[str, Any]]:
        return next(self._packed), self._packed.get_state()

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        pass


class _Shard:
    """One packer over every `shards`-th example; numbers count the examples of this shard."""

    def __init__(self, units: grain.MapDataset[Unit | Bad], budget: Budget, max_bad: float):
        self._units, self._budget, self._max_bad = units, budget, max_bad
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=2 * THREADS)
        self._ahead = iter(units.to_iter_dataset(options))
        self._waiting: dict[int, tuple[Sample, ...]] = {}
        self._drawn = self._bad = 0

    def next_row(self) -> list[Sample]:
        """Samples of the next row; the members of a unit stand next to each other."""
        waiting = {number: sizes(unit) for number, unit in self._waiting.items()}
        chosen = next_row(waiting, self._draws(), self._budget.sizes, LOOK_AHEAD)
        return [sample for number in chosen for sample in self._waiting.pop(number)]

    def _draws(self) -> Iterator[tuple[int, tuple[int, int, int]]]:
        """Further good units, which it adds to those that wait; bad ones are counted."""
        while True:
            unit = self._checked(next(self._ahead))
            number, self._drawn = self._drawn, self._drawn + 1
            if isinstance(unit, Bad):
                self._skip(unit)
            else:
                self._waiting[number] = unit
                yield number, sizes(unit)

    def _checked(self, unit: Unit | Bad) -> tuple[Sample, ...] | Bad:
        if isinstance(unit, Bad):
            return unit
        unit = unit if isinstance(unit, tuple) else (unit,)
        return unit if self._budget.holds(unit) else Bad(f"example {self._drawn} of its shard {over(unit, self._budget)}")

    def _skip(self, bad: Bad) -> None:
        self._bad += 1
        found = f"{self._bad} of {self._drawn} records so far cannot be learned from, the last because: {bad.reason}"
        if self._bad > self._max_bad * max(self._drawn, FEW):
            raise UserError(f"{found} The share is above data.max_bad = {self._max_bad}: mend the data, or raise it.")
        if self._bad & (self._bad - 1) == 0:  # 1, 2, 4, ...: a long run does not drown in them
            logging.getLogger(__name__).warning("skipped: %s", found)

    def get_state(self) -> dict[str, Any]:
        return {"drawn": self._drawn, "waiting": list(self._waiting), "bad": self._bad}

    def set_state(self, state: dict[str, Any]) -> None:
        self._drawn, self._bad = int(state["drawn"]), int(state["bad"])
        self._ahead.set_state({"next_index": self._drawn})
        self._waiting = {}
        for number in map(int, state["waiting"]):
            unit = self._checked(self._units[number])
            if isinstance(unit, Bad):
                raise UserError(
                    f"an example that waits for its row cannot be read any more, expected the data of before: {unit.reason}"
                )
            self._waiting[number] = unit


def batches(
    mixture: Mixture, tokenizer: Tokenizer, processor: ImageProcessor, budget: Budget, patch_features: int, average="token",
    host: int = 0, hosts: int = 1, workers: int = 0,
):  # fmt: skip
    """The training input of a host: an endless Grain dataset of packed batches, prepared ahead in threads or processes.

    Args:
      workers: processes of a host, which share its shards; 0: threads of this one, for which Python has one core.
    """
    samples = samples_of(mixture, tokenizer, processor, average)
    hosts *= max(1, workers)
    parts = [
        PackedBatches(samples, budget, patch_features, mixture.shards, part, hosts, mixture.max_bad)
        for part in range(host * max(1, workers), (host + 1) * max(1, workers))
    ]
    packed = PackedByProcesses(parts) if workers else parts[0]
    return grain_experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=2)
