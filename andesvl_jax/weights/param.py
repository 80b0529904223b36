"""Shape, logical axes, dtype and initializer of every parameter: one description, many uses.

Abstract values, initial values, counts, shardings, names on disk and optimizer labels follow from it.
A weight leaf is described by the same leaf kind with a `Param` in place of each array.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Param:
    """Description of one array.

    Matrices are stored [..., in, out], so that `apply(w, x)` contracts the last axis of x with the
    second-last of w; tables are [entries, width].

    Attributes:
      axes: name of each dimension for sharding ("layers", "embed", "heads", "mlp", "vocab", ...).
      init: initializer by name, or a number for a constant.
      dtype: None: the configuration's param_dtype.
      or_replicated: a dimension that the mesh does not divide is left whole instead of refused.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "residual", "zeros", "ones", "table", "position"] | float = "normal"
    dtype: str | None = None
    or_replicated: bool = False

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"Param of shape {self.shape} has {len(self.axes)} axis names {self.axes}, expected one each")

    @property
    def stacked(self) -> bool:
        """Whether the first dimension is that of the layers."""
        return self.axes[:1] == ("layers",)


def is_param(x: Any) -> bool:
    return isinstance(x, Param)


def abstract(description, dtype) -> Any:
    """The same tree with `jax.ShapeDtypeStruct` leaves: a restore target that allocates nothing."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype or dtype), description, is_leaf=is_param)


def count(description) -> int:
    """Number of parameters, without allocating any."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(description, is_leaf=is_param))


def initialize(description, key: jax.Array, dtype) -> Any:
    """Initial values, one key per array by its index in the tree.

    Matrices N(0, 1/fan_in), those that write into the residual stream a tenth of it, so that fresh layers do not drown a
    token; tables N(0, 0.05^2), the table of positions N(0, 0.5^2) because patches beside it have norm one; norms 1; biases 0.
    """
    params, tree = jax.tree.flatten(description, is_leaf=is_param)
    keys = [jax.random.fold_in(key, i) for i in range(len(params))]
    values = [initial_value(p, k, p.dtype or dtype) for p, k in zip(params, keys, strict=True)]
    return jax.tree.unflatten(tree, values)


def initial_value(param: Param, key: jax.Array, dtype) -> jax.Array:
    """One array as its description says."""
    if param.init in ("zeros", "ones") or not isinstance(param.init, str):
        value = {"zeros": 0.0, "ones": 1.0}.get(param.init, param.init)
        return jnp.full(param.shape, value, dtype)
    deviation = {"table": 0.05, "position": 0.5}
    if param.init in ("normal", "residual"):
        deviation = {"normal": param.shape[-2] ** -0.5, "residual": 0.1 * param.shape[-2] ** -0.5}
    return (deviation[param.init] * jax.random.normal(key, param.shape)).astype(dtype)
