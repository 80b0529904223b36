"""Floating-point operations of the network's matrix products, counted from its own list of parameters; 2 per multiply-add.

T tokens, P patches, M supervised tokens of a row.
"""

import math
from typing import Collection

import jax

from andesvl_jax.config import AndesVLConfig
from andesvl_jax.model.andesvl import describe
from andesvl_jax.weights import is_param

PARTS = ("vision", "projector", "decoder")  # in the order in which the forward pass meets them


def forward_flops(config: AndesVLConfig, rows: int, tokens: int, patches: int, outputs: int) -> dict[str, int]:
    """By part, for full rows: attention over whole rows (text causal, so half of it), logits at `outputs` tokens of a row."""
    vision, text, table = config.vision, config.text, describe(config)

    def matrices(tree) -> int:
        params = [p for p in jax.tree.leaves(tree, is_leaf=is_param) if len(p.shape) - (p.axes[0] == "layers") == 2]
        return sum(2 * math.prod(p.shape) for p in params)

    seen = 4 * vision.num_layers * vision.hidden_size * patches * patches
    read = 4 * text.num_layers * text.num_heads * text.head_dim * tokens * (tokens + 1) // 2
    head = 2 * text.vocab_size * text.hidden_size * outputs
    return {
        "vision": rows * (patches * matrices(table.vision) + seen),
        "projector": rows * patches // vision.merge_size**2 * matrices(table.projector),
        "decoder": rows * (tokens * matrices(table.decoder.layers) + read + head),
    }


def step_flops(config: AndesVLConfig, rows: int, tokens: int, patches: int, outputs: int, trained: Collection[str]) -> int:
    """A training step: each part's forward once, its weights' gradient where it is `trained`, its inputs' gradient where something
    before it is or itself is; what rematerialization repeats is not counted."""
    total = 0
    for i, (part, flops) in enumerate(forward_flops(config, rows, tokens, patches, outputs).items()):
        upstream = any(before in trained for before in PARTS[: i + 1])
        total += flops * (1 + (part in trained) + upstream)
    return total
