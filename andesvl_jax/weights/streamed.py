"""Matrices kept for decoding on CPU, where every token reads every weight once and memory sets the pace.

XLA's own products of a few rows reach about two thirds of the memory's speed in float32, and in bfloat16 a thirtieth: a trap
that half-sized weights must not fall into. These leaves go through a small C++ kernel instead. It has no gradient and does not
leave the house: training and export hold plain arrays.
r rows, i input width, o output width, E table entries, D table width.
"""

import jax
import jax.numpy as jnp
from flax import struct

from andesvl_jax.kernels import cpu
from andesvl_jax.weights.leaf import Leaf, add_bias, apply, dense, embed, leaf_kind, unembed
from andesvl_jax.weights.lora import LoRA

FEW_ROWS = 8  # beyond, XLA's matrix product is faster: it reads the weights no more often and computes faster


@leaf_kind
@struct.dataclass
class Streamed:
    """rows: [o, i], a matrix [i, o] transposed, so that each output is one run through memory; or a table [E, D] as it is.
    compiled: products go through the C++ kernels (`kernels.cpu.available`, asked before tracing), else through XLA."""

    rows: jax.Array
    table: bool = struct.field(pytree_node=False)
    compiled: bool = struct.field(pytree_node=False)


@dense.register(Streamed)
def _(w: Streamed, dtype=None):
    return dense(w.rows if w.table else jnp.swapaxes(w.rows, -1, -2), dtype)


@embed.register(Streamed)
def _(w: Streamed, ids, dtype):
    if w.rows.dtype.itemsize != 2 or not w.compiled:
        return embed(w.rows, ids, dtype)
    # XLA's CPU backend gathers no bfloat16: it would widen the whole table first
    return cpu.rows_of(ids.reshape(-1), w.rows).astype(dtype).reshape(*ids.shape, -1)


@apply.register(Streamed)
def _(w: Streamed, x, bias=None):
    return add_bias((_few_rows(x, w) if _is_few(x) else _many_rows(x, w)).astype(x.dtype), bias)


@unembed.register(Streamed)
def _(w: Streamed, x):
    return _few_rows(x, w) if _is_few(x) else _many_rows(x, w)


def _is_few(x: jax.Array) -> bool:
    return x.size <= FEW_ROWS * x.shape[-1]


def _few_rows(x: jax.Array, leaf: Streamed) -> jax.Array:
    """x [..., i], w [o, i] -> float32 [..., o]."""
    rows, w = x.reshape(-1, x.shape[-1]).astype(jnp.float32), leaf.rows
    if leaf.compiled:
        y = cpu.few_rows(rows, w)
    elif w.dtype == rows.dtype:
        y = unembed(w, rows)
    else:  # XLA fuses each sum of products into one loop over w, five times as fast as its dot of 16-bit numbers
        y = jnp.stack([jnp.sum(row * w.astype(row.dtype), -1) for row in rows])
    return y.reshape(*x.shape[:-1], -1)


def _many_rows(x: jax.Array, leaf: Streamed) -> jax.Array:
    """x [..., i], w [o, i] -> [..., o]; a 16-bit w is widened by itself: XLA would hold every matrix of the model in 32 bits."""
    w = leaf.rows
    if w.dtype.itemsize > 2 or not leaf.compiled:
        return apply(w.T, x)
    return apply(cpu.widened(w, x).T, x.astype(jnp.float32))


def stream_matrix(w: Leaf, dtype=None, compiled: bool = False) -> Leaf:
    """A dense matrix [i, o], or the one below an adapter, as a `Streamed` leaf in `dtype` (None: its own); others unchanged."""
    if isinstance(w, LoRA):
        return w.replace(base=stream_matrix(w.base, dtype, compiled))
    if isinstance(w, jax.Array) and w.ndim == 2:
        return Streamed(w.T.astype(dtype or w.dtype), False, compiled)
    return w


def stream_table(w: Leaf, dtype=None, compiled: bool = False) -> Leaf:
    """A dense table [E, D] as a `Streamed` leaf in `dtype` (None: its own); others, and None, unchanged."""
    return Streamed(w.astype(dtype or w.dtype), True, compiled) if isinstance(w, jax.Array) else w
