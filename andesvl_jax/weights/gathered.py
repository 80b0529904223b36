"""A weight stored in parts over a mesh and gathered where it is used: fully sharded data parallelism as a kind of leaf."""

import functools

import jax
from flax import struct
from jax.sharding import NamedSharding

from andesvl_jax.weights.leaf import dense, leaf_kind, lookup, multiply, multiply_transposed


@leaf_kind
@struct.dataclass
class Gathered:
    """weight [i, o] or a table [E, D], laid out as `stored`, needed as `used`; a leading layer axis is in neither of the two.

    Every use casts first, so that the narrower type travels, then gathers; the backward pass gathers again instead of keeping
    the whole weight, and its gradient goes straight back to the layout of the stored parts.
    """

    weight: jax.Array
    stored: NamedSharding = struct.field(pytree_node=False)
    used: NamedSharding = struct.field(pytree_node=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def relayout(x: jax.Array, stored: NamedSharding, used: NamedSharding) -> jax.Array:
    """x, which lies as `stored`, laid out as `used`; its gradient comes back as `stored`."""
    return jax.lax.with_sharding_constraint(x, used)


relayout.defvjp(
    lambda x, stored, used: (relayout(x, stored, used), None),
    # each device's share is summed whole before it is cut: a scatter into a cut table would spread the activations instead
    lambda stored, used, _, gradient: (
        jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(gradient, used), stored),
    ),
)


@dense.register(Gathered)
def _(w: Gathered, dtype=None):
    return relayout(dense(w.weight, dtype), w.stored, w.used)


@multiply.register(Gathered)
def _(w: Gathered, x):
    return jax.checkpoint(lambda w, x: multiply(dense(w, x.dtype), x))(w, x)


@lookup.register(Gathered)
def _(w: Gathered, ids, dtype):
    return jax.checkpoint(lambda w, ids: lookup(dense(w, dtype), ids, dtype))(w, ids)


@multiply_transposed.register(Gathered)
def _(w: Gathered, x):
    return jax.checkpoint(lambda w, x: multiply_transposed(dense(w, x.dtype), x))(w, x)
