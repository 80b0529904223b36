"""One description per array: shape, logical axes and initializer give abstract values, initial values and counts."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Param:
    """An array that does not exist yet.

    `axes` names each dimension for sharding ("layers", "embed", "heads", "mlp", "vocab", ...). Matrices are stored
    [..., in, out] so that `dot(x, w)` contracts the last axis of x with the second-last of w; tables are [entries, width].
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "residual", "zeros", "ones", "table", "position"] = "normal"

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"Param of shape {self.shape} has {len(self.axes)} axis names {self.axes}, expected one each")


def is_param(x: Any) -> bool:
    return isinstance(x, Param)


def abstract(description, dtype) -> Any:
    """The same tree with `jax.ShapeDtypeStruct` leaves: a restore target that allocates nothing."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), description, is_leaf=is_param)


def count(description) -> int:
    """Number of parameters, without allocating any."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(description, is_leaf=is_param))


def initialize(description, key: jax.Array, dtype) -> Any:
    """Initial values, one key per leaf by its place.

    Matrices N(0, 1/fan_in), those that write into the residual stream a tenth of it, so that fresh layers do not drown a
    token; tables N(0, 0.05^2), the table of positions N(0, 0.5^2) because patches beside it have norm one; norms 1; biases 0.
    """
    params, tree = jax.tree.flatten(description, is_leaf=is_param)
    return jax.tree.unflatten(tree, [_initial(p, jax.random.fold_in(key, i), dtype) for i, p in enumerate(params)])


def _initial(param: Param, key: jax.Array, dtype) -> jax.Array:
    if param.init == "zeros":
        return jnp.zeros(param.shape, dtype)
    if param.init == "ones":
        return jnp.ones(param.shape, dtype)
    scale = {"normal": param.shape[-2] ** -0.5, "residual": 0.1 * param.shape[-2] ** -0.5, "table": 0.05, "position": 0.5}[
        param.init
    ]
    return (scale * jax.random.normal(key, param.shape)).astype(dtype)
