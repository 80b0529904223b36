"""Grain pipeline: a weighted mixture of sources -> samples -> packed batches, with a state small enough to checkpoint.

A source gives examples of a task family or the messages of a conversation file.
"""

from dataclasses import dataclass, field
from typing import Mapping

import grain
import numpy as np
from grain import experimental as grain_experimental

from andesvl_jax.data.conversations import Conversations
from andesvl_jax.data.examples import MANY, Example
from andesvl_jax.data.registry import TASKS, render
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.chat import Message, images_of, render_training
from andesvl_jax.inputs.image import ImageProcessor, prepare_image
from andesvl_jax.inputs.packing import Batch, Budget, Sample, assemble, make_sample
from andesvl_jax.inputs.tokenizer import Tokenizer

LOOK_AHEAD = 8  # samples that may wait for a later batch when they fit no row of this one


@dataclass(frozen=True)
class Mixture:
    """Share of each task family or conversation file; those with weight 0 are left out."""

    weights: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(TASKS, 1.0))
    ramp: int = 0  # examples of a family over which its pictures fill up from one thing to many
    split: str = "train"
    seed: int = 0
    files: Mapping[str, str] = field(default_factory=dict)  # name of a source -> conversation file, see `data.conversations`
    image_root: str | None = None  # folder of the files' pictures; None: each file's own

    def __post_init__(self):
        unknown = sorted(set(self.weights) - set(TASKS) - set(self.files))
        if unknown:
            raise UserError(f"data.weights names {unknown[0]!r}, expected families among {', '.join((*TASKS, *self.files))}.")
        taken = sorted(set(self.files) & set(TASKS))
        if taken:
            raise UserError(f"data.files names {taken[0]!r}, which is a task family; expected another name.")
        if not any(weight > 0 for weight in self.weights.values()):
            raise UserError(
                f"data.weights is {dict(self.weights)}: the dataset is empty, expected a positive weight for some source."
            )


def crowd_at(index: int, ramp: int) -> int:
    """How many things a picture may hold: one in the first third of the ramp, then more step by step."""
    if index >= ramp:
        return MANY
    return max(1, 1 + int((MANY - 1) * (3 * index - ramp) / (2 * ramp)))


def examples(mixture: Mixture) -> grain.MapDataset:
    """An endless random-access dataset of examples and conversations: element i is a pure function of (mixture, i)."""
    weights = {source: weight for source, weight in mixture.weights.items() if weight > 0}

    def of(source: str) -> grain.MapDataset:
        if source in mixture.files:
            records = grain.MapDataset.source(Conversations(mixture.files[source], mixture.image_root))
            return records.shuffle(seed=mixture.seed).repeat()
        return grain.MapDataset.range(1 << 40).map(
            lambda i: render(source, mixture.seed, int(i), mixture.split, crowd_at(int(i), mixture.ramp))
        )

    return grain.MapDataset.mix([of(source) for source in weights], list(weights.values()))


def messages_of(example: Example) -> list[Message]:
    """An example as a conversation: its pictures stand before the first question."""
    messages = []
    for i, turn in enumerate(example.turns):
        pictures = [{"type": "image", "image": image} for image in example.images] if i == 0 else []
        question = [*pictures, {"type": "text", "text": turn.question}]
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": turn.answer}]
    return messages


def to_sample(example: Example | list[Message], tokenizer: Tokenizer, processor: ImageProcessor, average="token") -> Sample:
    """One conversation with its pictures prepared and its answers supervised."""
    messages = messages_of(example) if isinstance(example, Example) else example
    prepared = [prepare_image(image, processor) for image in images_of(messages)]
    ids, supervised = render_training(messages, tokenizer, [p.visual_tokens for p in prepared])
    return make_sample(ids, supervised, prepared, tokenizer.image_token_id, average)


class PackedBatches(grain.IterDataset[Batch]):
    """Packs an endless MapDataset of samples into batches of one static shape."""

    def __init__(self, samples: grain.MapDataset, budget: Budget, patch_features: int):
        super().__init__()
        self._samples, self._budget, self._patch_features = samples, budget, patch_features

    def __iter__(self) -> "PackedIterator":
        return PackedIterator(self._samples, self._budget, self._patch_features)


class PackedIterator(grain.DatasetIterator[Batch]):
    """State: the next sample to draw and the indices of those that still wait for a row."""

    def __init__(self, samples: grain.MapDataset, budget: Budget, patch_features: int):
        super().__init__()
        self._samples, self._budget, self._patch_features = samples, budget, patch_features
        self._next, self._waiting = 0, {}

    def __next__(self) -> Batch:
        rows: list[list[Sample]] = [[] for _ in range(self._budget.rows)]
        for index, sample in list(self._waiting.items()):
            if self._place(rows, sample):
                del self._waiting[index]
        while len(self._waiting) < LOOK_AHEAD:
            index, self._next = self._next, self._next + 1
            sample = self._samples[index]
            if not self._budget.holds([sample]):
                raise UserError(
                    f"sample {index} has {len(sample.tokens)} tokens, {sample.patches} patches and {sample.targets} targets, "
                    f"expected at most {self._budget.tokens}, {self._budget.patches} and {self._budget.targets} (budget)."
                )
            if not self._place(rows, sample):
                self._waiting[index] = sample
        return assemble(rows, self._budget, self._patch_features)

    def _place(self, rows: list[list[Sample]], sample: Sample) -> bool:
        fitting = [row for row in rows if self._budget.holds([*row, sample])]
        if fitting:
            max(fitting, key=lambda row: sum(len(s.tokens) for s in row)).append(sample)  # best fit: the fullest row
        return bool(fitting)

    def get_state(self) -> dict:
        waiting = np.full(LOOK_AHEAD, -1, np.int64)
        waiting[: len(self._waiting)] = list(self._waiting)
        return {"next": self._next, "waiting": waiting.tolist()}

    def set_state(self, state: dict) -> None:
        self._next = int(state["next"])
        self._waiting = {int(i): self._samples[int(i)] for i in state["waiting"] if i >= 0}


def batches(
    mixture: Mixture, tokenizer: Tokenizer, processor: ImageProcessor, budget: Budget, patch_features: int, average="token"
):
    """The training input: an endless Grain dataset of packed batches, prepared one ahead in a thread."""
    samples = examples(mixture).map(lambda example: to_sample(example, tokenizer, processor, average))
    packed = PackedBatches(samples, budget, patch_features)
    return grain_experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=2)
