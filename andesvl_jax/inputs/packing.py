"""Static shapes from ragged conversations: several samples and their images share a row; sizes come from a few buckets.

B batch rows, T tokens, P patches, M supervised tokens of a row. Everything here is host-side NumPy.
"""

from dataclasses import dataclass
from typing import Literal, Sequence

import numpy as np
from flax import struct

from andesvl_jax.errors import UserError
from andesvl_jax.inputs.image import Patches

MERGED = 4  # patches per visual token


@struct.dataclass
class ImageRow:
    """Images packed along P. patches: float32 [B, P, 3pp]; coordinates (row, col) and grids (rows, cols): int32 [B, P, 2];
    segments: int32 [B, P], the image's number within the row, -1 = padding."""

    patches: np.ndarray
    coordinates: np.ndarray
    grids: np.ndarray
    segments: np.ndarray


@struct.dataclass
class Batch:
    """tokens, positions (restart per sample, -1 = padding), segments (sample's number in the row, -1 = padding) and
    visual_index (which visual token of the row stands here, -1 = text): int32 [B, T]; target_slots, targets: int32 [B, M],
    the slots that predict a supervised token and that token, -1 = padding; target_weights: float32 [B, M], 0 = padding."""

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    visual_index: np.ndarray
    target_slots: np.ndarray
    targets: np.ndarray
    target_weights: np.ndarray
    images: ImageRow | None


@dataclass(frozen=True)
class Sample:
    """One conversation: tokens int32 [t]; supervised bool [t] marks tokens the loss is taken on; images in order.

    average: what a supervised token weighs in an answer of n tokens: "token" = 1, "square" = n^-0.5, "sample" = 1/n. With the
    last two long answers (boxes) do not drown short ones (the averaging rules that InternVL 2.5 compares).
    """

    tokens: np.ndarray
    supervised: np.ndarray
    images: tuple[Patches, ...]
    image_token_id: int
    average: Literal["token", "square", "sample"] = "token"

    @property
    def patches(self) -> int:
        return sum(len(image.patches) for image in self.images)

    @property
    def targets(self) -> int:
        return int(np.count_nonzero(self.supervised[1:]))

    @property
    def target_weights(self) -> np.ndarray:
        """float32 [targets]."""
        if self.average == "token":
            return np.ones(self.targets, np.float32)
        edges = np.flatnonzero(np.diff(self.supervised.astype(np.int8), prepend=0, append=0))  # start, end of each answer
        lengths = edges[1::2] - np.maximum(edges[::2], 1)  # nothing predicts the first token of a row
        return np.repeat(lengths, lengths).astype(np.float32) ** (-0.5 if self.average == "square" else -1.0)


@dataclass(frozen=True)
class Budget:
    """Static shape of a batch: `rows` x (`tokens`, `patches`, `targets`)."""

    rows: int
    tokens: int
    patches: int
    targets: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """What a row holds: tokens, patches, targets."""
        return self.tokens, self.patches, self.targets

    def holds(self, samples: Sequence[Sample]) -> bool:
        return all(size <= room for size, room in zip(sizes(samples), self.sizes, strict=True))


def sizes(samples: Sequence[Sample]) -> tuple[int, int, int]:
    """Tokens, patches and targets of samples that share a row."""
    return sum(len(s.tokens) for s in samples), sum(s.patches for s in samples), sum(s.targets for s in samples)


def over(samples: Sequence[Sample], budget: Budget) -> str:
    """The end of a sentence about samples that do not fit a row."""
    found, most = sizes(samples), budget.sizes
    return (
        f"has {found[0]} tokens, {found[1]} patches and {found[2]} targets, expected at most {most[0]}, {most[1]} and {most[2]} "
        "(budget)."
    )


def make_sample(
    tokens: Sequence[int], supervised: Sequence[bool], images: Sequence[Patches], image_token_id: int, average="token"
) -> Sample:
    """Raises UserError when the image slots among the tokens are not as many as the images have visual tokens."""
    tokens = np.asarray(tokens, np.int32)
    slots, given = int(np.count_nonzero(tokens == image_token_id)), sum(len(i.patches) for i in images) // MERGED
    if slots != given:
        raise UserError(
            f"the prompt has {slots} image slots but its {len(images)} images make {given} visual tokens; expected equal."
        )
    return Sample(tokens, np.asarray(supervised, bool), tuple(images), image_token_id, average)


def bucket(size: int, smallest: int = 64) -> int:
    """The smallest of 64, 96, 128, 192, 256, 384, ... that holds `size`: at most a third is padding."""
    edge = smallest
    while edge < size:
        edge = edge * 3 // 2 if (edge & (edge - 1)) == 0 else edge * 4 // 3
    return edge


def assemble(rows: Sequence[Sequence[Sample]], budget: Budget, patch_features: int) -> Batch:
    """Lays out the samples of each row one behind the other and pads to the budget.

    Raises UserError when a row does not fit the budget.
    """
    full = lambda *shape: np.full((budget.rows, *shape), -1, np.int32)  # noqa: E731
    tokens = np.zeros((budget.rows, budget.tokens), np.int32)
    positions, segments, visual_index = full(budget.tokens), full(budget.tokens), full(budget.tokens)
    target_slots, targets = full(budget.targets), full(budget.targets)
    target_weights = np.zeros((budget.rows, budget.targets), np.float32)
    images = ImageRow(
        patches=np.zeros((budget.rows, budget.patches, patch_features), np.float32),
        coordinates=np.zeros((budget.rows, budget.patches, 2), np.int32),
        grids=np.ones((budget.rows, budget.patches, 2), np.int32),
        segments=full(budget.patches),
    )
    for r, samples in enumerate(rows):
        if not budget.holds(samples):
            raise UserError(f"row {r} {over(samples, budget)}")
        t = p = m = image_number = 0
        for number, sample in enumerate(samples):
            span = slice(t, t + len(sample.tokens))
            tokens[r, span] = sample.tokens
            positions[r, span] = np.arange(len(sample.tokens))
            segments[r, span] = number
            slots = t + np.flatnonzero(sample.tokens == sample.image_token_id)
            visual_index[r, slots] = p // MERGED + np.arange(len(slots))
            predicted = np.flatnonzero(sample.supervised[1:])
            target_slots[r, m : m + len(predicted)] = t + predicted
            targets[r, m : m + len(predicted)] = sample.tokens[1:][predicted]
            target_weights[r, m : m + len(predicted)] = sample.target_weights
            for image in sample.images:
                place = slice(p, p + len(image.patches))
                images.patches[r, place] = image.patches
                images.coordinates[r, place] = image.coordinates
                images.grids[r, place] = image.grid
                images.segments[r, place] = image_number
                p, image_number = place.stop, image_number + 1
            t, m = span.stop, m + len(predicted)
    return Batch(
        tokens, positions, segments, visual_index, target_slots, targets, target_weights, images if budget.patches else None
    )


def fill(batch: Batch) -> dict[str, float]:
    """Share of the slots in use, 0..1: tokens, patches and targets. The largest is that of the tightest budget."""
    used = {"tokens": batch.segments, "targets": batch.target_slots}
    if batch.images is not None:
        used["patches"] = batch.images.segments
    return {name: float(np.mean(slots >= 0)) for name, slots in used.items() if slots.size}


def assemble_prompts(samples: Sequence[Sample], patch_features: int) -> Batch:
    """One prompt per row, padded to buckets: the number of compiled programs is the number of bucket pairs.

    Raises UserError for a sample with supervised tokens, whose targets a prompt has no room for.
    """
    for row, sample in enumerate(samples):
        if sample.targets:
            raise UserError(
                f"prompt {row} has {sample.targets} supervised tokens, expected none: a prompt is only continued; lay training "
                "samples out with `assemble`."
            )
    patches = max(s.patches for s in samples)
    budget = Budget(len(samples), bucket(max(len(s.tokens) for s in samples)), bucket(patches) if patches else 0, 0)
    return assemble([[s] for s in samples], budget, patch_features)
