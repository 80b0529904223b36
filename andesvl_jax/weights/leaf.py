"""What the network does with a weight leaf. A new kind of leaf is one file that registers these functions.

Letters: i input width, o output width, E table entries, D table width. Leading axes of x are free.
The default implementations serve plain arrays; other kinds register theirs with `@apply.register(Kind)` and so on.
"""

import functools
import re
from typing import Any, Callable

import jax
import jax.numpy as jnp

from andesvl_jax.errors import UserError

Leaf = Any  # a jax.Array or a registered kind (LoRA, FakeQuantized, Packed, ...)
_KINDS: list[type] = []


def leaf_kind(cls):
    """Class decorator: marks a pytree class as one weight leaf, so that tree maps over weights stop there."""
    _KINDS.append(cls)
    return cls


def is_leaf(x: Any) -> bool:
    return isinstance(x, tuple(_KINDS))


@functools.singledispatch
def dense(w: Leaf, dtype=None) -> jax.Array:
    """The array [..., i, o] (or [E, D]) that the leaf stands for."""
    return w if dtype is None else w.astype(dtype)


@functools.singledispatch
def apply(w: Leaf, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x [..., i] times leaf [i, o], plus bias [o] -> [..., o] in x's dtype.

    The bias is inside, so that a leaf with a quantized output rounds what the deployed graph rounds.
    """
    rows = x.reshape(-1, x.shape[-1])  # a 3-D operand makes XLA's CPU backward pass transpose the activations
    y = (rows @ dense(w, x.dtype)).reshape(*x.shape[:-1], -1)
    return add_bias(y, bias)


def add_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias.astype(y.dtype)


@functools.singledispatch
def embed(table: Leaf, ids: jax.Array, dtype) -> jax.Array:
    """Rows [..., D] of table [E, D] at integer ids [...]."""
    return jnp.take(table, ids, axis=0).astype(dtype)


@functools.singledispatch
def unembed(table: Leaf, x: jax.Array) -> jax.Array:
    """x [..., D] times the transpose of table [E, D] -> float32 [..., E]: the output head."""
    return jnp.einsum("...d,vd->...v", x, dense(table, x.dtype), preferred_element_type=jnp.float32)


@functools.singledispatch
def output_range(w: Leaf) -> Any:
    """The quantization range of the leaf's output; None: the output is not quantized."""
    return None


@functools.singledispatch
def requantize(w: Leaf, y: jax.Array) -> jax.Array:
    """y [..., o] rounded as the leaf's own output is: an adapter over the leaf adds in its range."""
    return y


def map_leaves(fn: Callable[[Leaf], Leaf], params, pattern: str, extra: Any = None):
    """Applies fn(leaf[, index]) to the leaves whose path ("decoder.layers.q") matches the regular expression.

    With `extra` (a PRNG key) fn is called as fn(leaf, key_i), one key per matched leaf in path order.
    Raises UserError when nothing matches, because a pattern that hits nothing is a typing mistake.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    hits = [i for i, (path, _) in enumerate(flat) if re.fullmatch(pattern, path_name(path))]
    if not hits:
        raise UserError(f"pattern {pattern!r} matches none of the {len(flat)} weight leaves.")
    leaves = [leaf for _, leaf in flat]
    for n, i in enumerate(hits):
        leaves[i] = fn(leaves[i]) if extra is None else fn(leaves[i], jax.random.fold_in(extra, n))
    return jax.tree.unflatten(tree, leaves)


def path_name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
