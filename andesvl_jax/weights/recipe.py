"""Which weights take which representation: an ordered list of rules that maps parameters and descriptions alike."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from andesvl_jax.errors import UserError
from andesvl_jax.weights.leaf import Leaf, dense, is_leaf, path_name
from andesvl_jax.weights.lora import LoRA
from andesvl_jax.weights.param import Param, initial_value, is_param
from andesvl_jax.weights.quantized import FakeQuantized, Packed, pack
from andesvl_jax.weights.schemes import Scheme


class Form(Protocol):
    """A representation that a rule gives to a leaf."""

    def convert(self, w: Leaf, key: jax.Array | None) -> Leaf:
        """The leaf in the new representation."""

    def describe(self, described: Param | Leaf) -> Leaf:
        """The same for a description: a leaf kind with a `Param` in place of each array."""


@dataclass(frozen=True)
class Quantize:
    """A dense leaf -> `Packed`. axis: the contracted one, -2 of a matrix, -1 of a table."""

    scheme: Scheme
    axis: int = -2

    def convert(self, w: Leaf, key: jax.Array | None) -> Packed:
        return pack(dense(w), self.scheme, self.axis)

    def describe(self, described: Param) -> Packed:
        x = jax.ShapeDtypeStruct(described.shape, jnp.arange(0.0).dtype)
        shapes = jax.eval_shape(lambda w: pack(w, self.scheme, self.axis), x)
        return jax.tree.map(lambda s: _stored(s, described), shapes)


@dataclass(frozen=True)
class Simulate:
    """A leaf -> `FakeQuantized`: the forward pass of `Quantize`, with gradients."""

    scheme: Scheme
    axis: int = -2

    def convert(self, w: Leaf, key: jax.Array | None) -> FakeQuantized:
        self.scheme.check(jax.eval_shape(dense, w).shape[self.axis])
        return FakeQuantized(w, self.scheme, self.axis)

    def describe(self, described: Param) -> FakeQuantized:
        self.scheme.check(described.shape[self.axis])
        return FakeQuantized(described, self.scheme, self.axis)


@dataclass(frozen=True)
class Adapt:
    """A matrix leaf -> `LoRA` over it. The new adapter changes nothing: a ~ N(0, 1/i), b = 0.

    rank_stabilized: scale alpha / sqrt(rank) instead of alpha / rank (rsLoRA, arXiv 2312.03732).
    """

    rank: int
    alpha: float
    rank_stabilized: bool = False

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise UserError(f"adapter rank: found {self.rank!r}, expected a whole number of at least 1.")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def convert(self, w: Leaf, key: jax.Array | None) -> LoRA:
        *lead, i, o = jax.eval_shape(dense, w).shape
        a, b, scale = self._params(Param((*lead, i, o), (None,) * (len(lead) + 2)))
        values = [initial_value(p, key, jnp.arange(0.0).dtype) for p in (a, b, scale)]
        return LoRA(w, *values)

    def describe(self, described: Param | Leaf) -> LoRA:
        shape = described if is_param(described) else _dense_param(described)
        return LoRA(described, *self._params(shape))

    def _params(self, w: Param) -> tuple[Param, Param, Param]:
        (*lead, i, o), (*axes, i_axis, o_axis) = w.shape, w.axes
        return (
            Param((*lead, i, self.rank), (*axes, i_axis, None), "normal", or_replicated=True),
            Param((*lead, self.rank, o), (*axes, None, o_axis), "zeros", or_replicated=True),
            Param(tuple(lead), tuple(axes), float(self.scale)),
        )


@dataclass(frozen=True)
class Rule:
    """pattern: regular expression that a leaf's whole path ("decoder.layers.q") has to match."""

    pattern: str
    form: Form


@dataclass(frozen=True)
class Recipe:
    rules: tuple[Rule, ...]


def represent(tree, recipe: Recipe | Sequence[Rule], key: jax.Array | None = None):
    """The tree with each matched leaf in the representation of its rule.

    Args:
      tree: parameters, or a description of them (`Param` in place of arrays).
      recipe: rules in order. A leaf may be quantized once and adapted once.
      key: PRNG key for new adapters; a description needs none.
    Raises:
      UserError: a rule that matches no leaf, a leaf that two rules of one kind match, a norm or a bias, or a group that
        does not divide.
    """
    rules = recipe.rules if isinstance(recipe, Recipe) else tuple(recipe)
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: is_leaf(x) or is_param(x))
    names, leaves = [path_name(path) for path, _ in flat], [leaf for _, leaf in flat]
    taken: dict[tuple[bool, int], int] = {}  # (adapted, leaf) -> rule
    for number, rule in enumerate(rules):
        hits = [i for i, name in enumerate(names) if re.fullmatch(rule.pattern, name)]
        if not hits:
            raise UserError(f"recipe rule {rule.pattern!r} matches none of the {len(leaves)} weights, such as {names[0]}.")
        adapts = isinstance(rule.form, Adapt)
        for i in hits:
            first = taken.setdefault((adapts, i), number)
            if first != number or (not adapts and isinstance(leaves[i], LoRA)):
                raise UserError(
                    f"recipe: {names[i]} is matched by {rules[first].pattern!r} and by {rule.pattern!r}, expected one rule to "
                    "quantize a weight and then at most one to adapt it."
                )
            own_key = None if key is None else jax.random.fold_in(jax.random.fold_in(key, number), i)
            leaves[i] = _represented(leaves[i], names[i], rule.form, own_key)
    return jax.tree.unflatten(treedef, leaves)


def _represented(w: Leaf | Param, name: str, form: Form, key: jax.Array | None) -> Leaf:
    shape = _dense_param(w).shape if is_description(w) else jax.eval_shape(dense, w).shape
    stacked = ".layers." in name and not re.search(r"\.layers\.\d+\.", name)
    if len(shape) - stacked != 2:
        raise UserError(f"recipe: {name} has shape {list(shape)}, expected a matrix or a table, not a norm or a bias.")
    try:
        return form.describe(w) if is_description(w) else form.convert(w, key)
    except UserError as error:
        raise UserError(f"recipe, {name}: {error}") from error


def is_description(w: Leaf | Param) -> bool:
    """Whether a leaf holds `Param`s in place of arrays."""
    return any(is_param(x) for x in jax.tree.leaves(w, is_leaf=is_param))


def _dense_param(described: Leaf | Param) -> Param:
    """Shape and axes of the dense array that a described leaf represents."""
    if is_param(described):
        return described
    first = jax.tree.leaves(described, is_leaf=is_param)[0]
    if isinstance(described, Packed):
        return Param((*first.shape[:-2], *described.shape), first.axes)
    return first


def _stored(shape: jax.ShapeDtypeStruct, dense_param: Param) -> Param:
    return Param(shape.shape, dense_param.axes, "zeros", str(shape.dtype), or_replicated=True)
