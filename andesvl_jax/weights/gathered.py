"""A weight stored in parts over a mesh and gathered where it is used: fully sharded data parallelism as a kind of leaf."""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding

from andesvl_jax.weights.leaf import Leaf, add_bias, apply, dense, embed, leaf_kind, unembed

CONTEXT = "context"  # the mesh axis that cuts the tokens of a row


@leaf_kind
@struct.dataclass
class Gathered:
    """Any leaf whose arrays lie as `stored` and are needed as `used`, in the order of `jax.tree.leaves(leaf)`.

    A leading layer axis is in neither of the two. Every use casts dense arrays first, so that the narrower type travels, then
    gathers; the backward pass gathers again instead of keeping the whole weight, and its gradient goes straight back to the
    layout of the stored parts.
    """

    leaf: Leaf
    stored: tuple[NamedSharding, ...] = struct.field(pytree_node=False)
    used: tuple[NamedSharding, ...] = struct.field(pytree_node=False)


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


def gathered(w: Gathered, dtype=None) -> Leaf:
    """The leaf with its arrays laid out for use; a dense one in `dtype`."""
    leaf = w.leaf if dtype is None or not isinstance(w.leaf, jax.Array) else dense(w.leaf, dtype)
    arrays, tree = jax.tree.flatten(leaf)
    places = zip(arrays, w.stored, w.used, strict=True)
    return tree.unflatten([x if stored == used else _relaid(x, stored, used) for x, stored, used in places])


def _relaid(x: jax.Array, stored: NamedSharding, used: NamedSharding) -> jax.Array:
    # codes have no gradient, and a rule for one cannot be given for integers
    return relayout(x, stored, used) if jnp.issubdtype(x.dtype, jnp.inexact) else jax.lax.with_sharding_constraint(x, used)


@dense.register(Gathered)
def _(w: Gathered, dtype=None):
    return dense(gathered(w, dtype), dtype)


@apply.register(Gathered)
def _(w: Gathered, x, bias=None):
    def product(w: Gathered, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        leaf = gathered(w, x.dtype)
        if isinstance(leaf, jax.Array) and w.used[0].mesh.shape.get(CONTEXT, 1) > 1:
            return add_bias(x @ leaf, bias)  # rows that `context` cuts cannot be laid end to end
        return apply(leaf, x, bias)

    return jax.checkpoint(product)(w, x, bias)


@embed.register(Gathered)
def _(w: Gathered, ids, dtype):
    return jax.checkpoint(lambda w, ids: embed(gathered(w, dtype), ids, dtype))(w, ids)


@unembed.register(Gathered)
def _(w: Gathered, x):
    return jax.checkpoint(lambda w, x: unembed(gathered(w, x.dtype), x))(w, x)
