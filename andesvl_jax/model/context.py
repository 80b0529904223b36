"""Attention in parts over a mesh, and what else crosses the borders between the parts of one row.

The mesh axis `context` cuts the tokens and the patches of a row into blocks, in order. All but attention, the places of visual
tokens and the loss works on single tokens and knows nothing of it.
B batch rows, T tokens, S slots, N query heads, K kv heads, H head width, D model width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from andesvl_jax.errors import UserError
from andesvl_jax.model.devices import HEAD_AXES, ROW_AXES
from andesvl_jax.weights import CONTEXT


def blocks() -> int:
    """Parts that the mesh in context cuts a row into."""
    return jax.sharding.get_abstract_mesh().shape.get(CONTEXT, 1)


def attend_in_parts(fn: Callable, q, k, v, place: Any, extra: Sequence = (), extra_specs: Sequence = ()) -> jax.Array:
    """fn(q, k, v, place, *extra) -> like q, run by each device of the mesh on its own rows, tokens and heads.

    Too few kv heads to deal out are repeated, one for each query head; rows that do not divide are taken by every device.

    Args:
      q: [B, T, N, H]; k, v: [B, K, T, H]; place: a tree of [B, T]; extra: what else fn takes, cut as `extra_specs` say.
    Raises:
      UserError: tokens that `context` does not divide.
    """
    mesh, parts = jax.sharding.get_abstract_mesh(), blocks()
    if q.shape[1] % parts:
        raise UserError(f"--mesh: a row has {q.shape[1]} tokens or patches, expected a multiple of {parts}, the size of context.")
    rows, heads, tokens = cut(ROW_AXES, q.shape[0]), cut(HEAD_AXES, q.shape[2]), cut((CONTEXT,), q.shape[1])
    if cut(HEAD_AXES, k.shape[1]) != heads:
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[1], axis=1) for x in (k, v))
    wide, narrow = P(rows, tokens, heads, None), P(rows, heads, tokens, None)
    return jax.shard_map(
        fn, mesh=mesh, in_specs=(wide, narrow, narrow, P(rows, tokens), *extra_specs), out_specs=wide,
        check_vma=False,  # a kernel's outputs are not typed so
    )(q, k, v, place, *extra)  # fmt: skip


def cut(axes: Sequence[str], size: int) -> tuple[str, ...]:
    """The axes of the mesh in context that cut a dimension of this size; () where it does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in axes if axis in mesh.shape)
    return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()


def place_tokens(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, S, D] at index, int32 [B, T] counted in the whole row -> [B, T, D]; an index < 0 takes any."""
    place = lambda x, index: jnp.take_along_axis(all_tokens(x), jnp.maximum(index, 0)[..., None], axis=1)  # noqa: E731
    if blocks() == 1:
        return place(x, index)
    part = P(cut(ROW_AXES, x.shape[0]), CONTEXT)
    return jax.shard_map(place, in_specs=(part, part), out_specs=part, axis_names={*ROW_AXES, CONTEXT})(x, index)


def take_tokens(x: jax.Array, slots: jax.Array) -> jax.Array:
    """x [B, T, D] at slots, int32 [B, S] counted in the whole row -> [B, S, D]; a slot < 0 takes any.

    Inside a `shard_map` over the parts of a row, x and slots are those of one part; what the slots ask for comes from the parts
    that hold it.
    """
    if not _inside():
        return jnp.take_along_axis(x, jnp.maximum(slots, 0)[..., None], axis=1)
    slots = all_tokens(slots) - jax.lax.axis_index(CONTEXT) * x.shape[1]
    here = (slots >= 0) & (slots < x.shape[1])
    taken = jnp.take_along_axis(x, jnp.where(here, slots, 0)[..., None], axis=1)
    return jax.lax.psum_scatter(jnp.where(here[..., None], taken, 0), CONTEXT, scatter_dimension=1, tiled=True)


def all_tokens(x: jax.Array, axis: int = 1) -> jax.Array:
    """Inside a `shard_map`, the parts of a row side by side; its gradient goes back to the part that it is of. Outside: x."""
    return jax.lax.all_gather(x, CONTEXT, axis=axis, tiled=True) if _inside() else x


def _inside() -> bool:
    """Whether what is traced is one device's part of a row."""
    return blocks() > 1 and CONTEXT in jax.sharding.get_abstract_mesh().manual_axes
