"""Ground floor: kinds of weight leaves and the few things a network may do with one. Imports no model."""

from andesvl_jax.weights.leaf import CONTEXT, Leaf, dense, dot, embed, is_leaf, map_leaves, path_name, unembed
from andesvl_jax.weights.lora import ALL_MATRICES, DECODER_MATRICES, LoRA, add_lora, merge_lora, stack_adapters
from andesvl_jax.weights.param import Param, abstract, count, initialize, is_param
from andesvl_jax.weights.quantized import FakeQuantized, Packed, pack_leaves, quantize, quantize_leaves, simulate_leaves
from andesvl_jax.weights.streamed import Streamed, stream_matrix, stream_table

__all__ = [
    "ALL_MATRICES", "CONTEXT", "DECODER_MATRICES", "FakeQuantized", "Leaf", "LoRA", "Packed", "Param", "Streamed", "abstract",
    "add_lora", "count", "dense", "dot", "embed", "initialize", "is_leaf", "is_param", "map_leaves", "merge_lora",
    "pack_leaves", "path_name", "quantize", "quantize_leaves", "simulate_leaves", "stack_adapters", "stream_matrix",
    "stream_table", "unembed",
]  # fmt: skip
