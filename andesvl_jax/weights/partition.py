"""A parameter tree in two: the arrays that are trained and the rest, each in the structure of the whole.

Gradients, moments and their collectives exist for the trained part alone; integer codes never meet a gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from andesvl_jax.errors import UserError
from andesvl_jax.weights.leaf import path_name
from andesvl_jax.weights.param import is_param

Trainable = Callable[[str, Any], bool]


def partition(params, trainable: Trainable) -> tuple[Any, Any]:
    """(trained, frozen): two trees like `params`, with None where an array belongs to the other.

    Args:
      params: arrays, abstract arrays, or descriptions.
      trainable: (path of an array such as "decoder.layers.q.a", the array) -> whether it is trained.
    Raises:
      UserError: an integer array would be trained.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_param)
    chosen = [bool(trainable(path_name(path), x)) for path, x in flat]
    for (path, x), wanted in zip(flat, chosen, strict=True):
        if wanted and x.dtype is not None and not jnp.issubdtype(x.dtype, jnp.inexact):
            raise UserError(f"weights {path_name(path)}: {x.dtype} codes cannot be trained; train an adapter over them.")
    trained = [x if wanted else None for (_, x), wanted in zip(flat, chosen, strict=True)]
    frozen = [None if wanted else x for (_, x), wanted in zip(flat, chosen, strict=True)]
    return tree.unflatten(trained), tree.unflatten(frozen)


def combine(trained, frozen):
    """The whole tree of the two parts."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None)


def select(tree, like):
    """The parts of `tree` where `like`, one of the two that `partition` gives, has an array; None elsewhere."""
    return jax.tree.map(lambda x, kept: None if kept is None else x, tree, like, is_leaf=lambda x: x is None or is_param(x))
