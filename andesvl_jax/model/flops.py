"""Floating-point operations of the network's matrix products, counted from its own list of parameters; 2 per multiply-add.

What is counted is what the work needs: causal attention is half a square, padding is nothing, and neither is what
rematerialization repeats or the position table, whose 16 taps per patch are no matrix product.
T tokens, P patches of a row.
"""

import math
from dataclasses import dataclass
from typing import Callable, Collection

import jax
import numpy as np

from andesvl_jax.config import AndesVLConfig, VisionConfig
from andesvl_jax.inputs.packing import Batch
from andesvl_jax.model.andesvl import describe
from andesvl_jax.weights import is_param

PARTS = ("vision", "projector", "decoder")  # in the order in which the forward pass meets them


@dataclass(frozen=True)
class _Work:
    """What rows ask of the network. Pairs are those of a query and a key that it sees: `text_pairs` in one layer of the decoder,
    `image_pairs` in all layers of the encoder together, because some may see windows alone. outputs: tokens with logits."""

    tokens: int
    text_pairs: int
    patches: int
    image_pairs: int
    outputs: int


def forward_flops(config: AndesVLConfig, rows: int, tokens: int, patches: int, outputs: int) -> dict[str, int]:
    """By part, for full rows that hold one conversation and one picture each; logits at `outputs` tokens of a row."""
    work = _full_rows(config, rows, tokens, patches, outputs)
    return {part: p.entry + p.matrices + p.attention for part, p in _products(config, work).items()}


def step_flops(config: AndesVLConfig, rows: int, tokens: int, patches: int, outputs: int, trained: Collection[str]) -> int:
    """A training step of such rows: the forward pass; the gradient of the weights of `trained` parts; the gradient of what flows
    into a product, which for attention is two of them, wherever something before it is trained."""
    return _step(config, _full_rows(config, rows, tokens, patches, outputs), trained)


def batch_flops(config: AndesVLConfig, batch: Batch, trained: Collection[str]) -> int:
    """A training step on what the samples and pictures of a packed batch (NumPy arrays) need."""
    tokens, outputs = (int(np.count_nonzero(x >= 0)) for x in (batch.segments, batch.target_slots))
    text_pairs = int(np.sum(batch.positions + 1, dtype=np.int64))  # a token at position n sees n + 1; padding stands at -1
    if batch.images is None:
        return _step(config, _Work(tokens, text_pairs, 0, 0, outputs), trained)
    here = batch.images.segments >= 0
    grids, coordinates = batch.images.grids[here].astype(np.int64), batch.images.coordinates[here]

    def pairs(side: int | None) -> int:
        seen = grids if side is None else np.minimum(side, grids - coordinates // side * side)  # windows end with the picture
        return int(seen.prod(-1).sum())

    image_pairs = _over_layers(config.vision, pairs)
    return _step(config, _Work(tokens, text_pairs, len(grids), image_pairs, outputs), trained)


def _full_rows(config: AndesVLConfig, rows: int, tokens: int, patches: int, outputs: int) -> _Work:
    pairs = lambda side: rows * patches * (patches if side is None else min(patches, side**2))  # noqa: E731
    image_pairs = _over_layers(config.vision, pairs)
    return _Work(rows * tokens, rows * tokens * (tokens + 1) // 2, rows * patches, image_pairs, rows * outputs)


def _over_layers(vision: VisionConfig, pairs: Callable[[int | None], int]) -> int:
    """`pairs(side of a window in patches, None: whole pictures)` summed over the encoder's layers."""
    full = vision.full_attention_layers
    if full is None:
        return vision.num_layers * pairs(None)
    side = vision.window_size // vision.base * vision.merge_size
    return len(set(full)) * pairs(None) + (vision.num_layers - len(set(full))) * pairs(side)


@dataclass(frozen=True)
class _Products:
    """FLOPs of a part: `entry` multiplies what comes into it, `matrices` are the other weights, `attention` has none."""

    entry: int
    matrices: int
    attention: int


def _products(config: AndesVLConfig, work: _Work) -> dict[str, _Products]:
    vision, text, table = config.vision, config.text, describe(config)

    def matrices(tree) -> int:
        params = [p for p in jax.tree.leaves(tree, is_leaf=is_param) if len(p.shape) - (p.axes[0] == "layers") == 2]
        return sum(2 * math.prod(p.shape) for p in params)

    merged = work.patches // vision.merge_size**2
    return {
        "vision": _Products(
            work.patches * matrices(table.vision.patch),
            work.patches * matrices(table.vision.layers),
            4 * vision.hidden_size * work.image_pairs,
        ),
        "projector": _Products(merged * matrices(table.projector.fc1), merged * matrices(table.projector.fc2), 0),
        "decoder": _Products(
            0,
            work.tokens * matrices(table.decoder.layers) + 2 * text.vocab_size * text.hidden_size * work.outputs,
            4 * text.num_layers * text.num_heads * text.head_dim * work.text_pairs,
        ),
    }


def _step(config: AndesVLConfig, work: _Work, trained: Collection[str]) -> int:
    total = 0
    for i, (part, p) in enumerate(_products(config, work).items()):
        before, here = any(name in trained for name in PARTS[:i]), part in trained
        total += p.entry * (1 + here + before) + p.matrices * (1 + here + (before or here))
        total += p.attention * (3 if before or here else 1)
    return total
