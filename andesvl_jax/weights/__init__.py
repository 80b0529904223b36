"""Kinds of weight leaves and what the network does with one. Imports no model."""

from andesvl_jax.weights.gathered import CONTEXT, Gathered
from andesvl_jax.weights.leaf import (
    Leaf,
    apply,
    dense,
    embed,
    is_leaf,
    map_leaves,
    output_range,
    path_name,
    requantize,
    unembed,
)
from andesvl_jax.weights.lora import (
    ALL_MATRICES,
    DECODER_MATRICES,
    LoRA,
    merge_lora,
    stack_adapters,
)
from andesvl_jax.weights.param import Param, abstract, count, initialize, is_param
from andesvl_jax.weights.quantized import FakeQuantized, Packed, pack, pack_leaves
from andesvl_jax.weights.recipe import Adapt, Quantize, Recipe, Rule, Simulate, represent
from andesvl_jax.weights.schemes import SCHEMES, Int4, Int8, Scheme, Ternary
from andesvl_jax.weights.streamed import Streamed, stream_matrix, stream_table

__all__ = [
    "ALL_MATRICES",
    "CONTEXT",
    "DECODER_MATRICES",
    "SCHEMES",
    "Adapt",
    "FakeQuantized",
    "Gathered",
    "Int4",
    "Int8",
    "Leaf",
    "LoRA",
    "Packed",
    "Param",
    "Quantize",
    "Recipe",
    "Rule",
    "Scheme",
    "Simulate",
    "Streamed",
    "Ternary",
    "abstract",
    "apply",
    "count",
    "dense",
    "embed",
    "initialize",
    "is_leaf",
    "is_param",
    "map_leaves",
    "merge_lora",
    "output_range",
    "pack",
    "pack_leaves",
    "path_name",
    "represent",
    "requantize",
    "stack_adapters",
    "stream_matrix",
    "stream_table",
    "unembed",
]
