"""Quantized weights as leaves: stored (`Packed`) and simulated with gradients (`FakeQuantized`), by one `Scheme` for both.

The contracted axis is -2 of a matrix [..., i, o] and -1 of a table [E, D]; a scheme sees it last.
"""

import jax
import jax.numpy as jnp
from flax import struct

from andesvl_jax.weights.leaf import Leaf, apply, dense, embed, is_leaf, leaf_kind, unembed
from andesvl_jax.weights.schemes import Scheme


@leaf_kind
@struct.dataclass
class FakeQuantized:
    """A float leaf that acts as its packed self; gradients reach `weight` by the scheme's rule."""

    weight: Leaf
    scheme: Scheme = struct.field(pytree_node=False)
    axis: int = struct.field(pytree_node=False, default=-2)


@leaf_kind
@struct.dataclass
class Packed:
    """arrays: what the scheme stores, by name, laid out like the weight except along `axis`.

    shape: of the matrix (i, o) or table (E, D) without a layer axis, since packing may pad.
    """

    arrays: dict[str, jax.Array]
    scheme: Scheme = struct.field(pytree_node=False)
    shape: tuple[int, int] = struct.field(pytree_node=False)
    axis: int = struct.field(pytree_node=False, default=-2)


def pack(weight: jax.Array, scheme: Scheme, axis: int = -2) -> Packed:
    """float [..., i, o] (or [E, D] with axis -1) -> Packed.

    Raises:
      UserError: a group that does not divide the axis, or an axis that cannot be packed.
    """
    scheme.check(weight.shape[axis])
    encoded = scheme.encode(jnp.moveaxis(weight.astype(jnp.float32), axis, -1))
    arrays = {name: jnp.moveaxis(x, -1, axis) for name, x in scheme.pack(encoded).items()}
    return Packed(arrays, scheme, weight.shape[-2:], axis)


def pack_leaves(params):
    """Every FakeQuantized leaf -> the Packed leaf that it simulates."""

    def convert(w: Leaf) -> Leaf:
        if isinstance(w, FakeQuantized):
            return pack(dense(w.weight), w.scheme, w.axis)
        return jax.tree.map(convert, w, is_leaf=lambda x: x is not w and is_leaf(x)) if is_leaf(w) else w

    return jax.tree.map(convert, params, is_leaf=is_leaf)


def _decode(arrays, scheme: Scheme, axis: int, n: int) -> jax.Array:
    stored = {name: jnp.moveaxis(x, axis, -1) for name, x in arrays.items()}
    return jnp.moveaxis(scheme.decode(scheme.unpack(stored, n)), -1, axis)


@dense.register(Packed)
def _(w: Packed, dtype=None):
    value = _decode(w.arrays, w.scheme, w.axis, w.shape[w.axis])
    return value if dtype is None else value.astype(dtype)


@dense.register(FakeQuantized)
def _(w: FakeQuantized, dtype=None):
    weight = dense(w.weight)
    packed = pack(jax.lax.stop_gradient(weight), w.scheme, w.axis)
    value = w.scheme.straight_through(weight, dense(packed, weight.dtype))
    return value if dtype is None else value.astype(dtype)


def _beside(w: Packed, x: jax.Array) -> tuple[Packed, jax.Array]:
    """The leaf tied to x: XLA would lift its decoding out of a loop and hold the whole model in float32."""
    arrays, x = jax.lax.optimization_barrier((w.arrays, x))
    return w.replace(arrays=arrays), x


@apply.register(Packed)
def _(w: Packed, x, bias=None):
    w, x = _beside(w, x)
    return apply(dense(w, x.dtype), x, bias)


@unembed.register(Packed)
def _(w: Packed, x):
    w, x = _beside(w, x)
    return unembed(dense(w, x.dtype), x)


@embed.register(Packed)
def _(w: Packed, ids, dtype):
    _require_rows(w)
    rows = {name: jnp.take(x, ids, axis=0) for name, x in w.arrays.items()}
    return _decode(rows, w.scheme, -1, w.shape[-1]).astype(dtype)


@embed.register(FakeQuantized)
def _(w: FakeQuantized, ids, dtype):
    _require_rows(w)
    return jnp.take(dense(w), ids, axis=0).astype(dtype)


def _require_rows(table: FakeQuantized | Packed) -> None:
    if table.axis != -1:
        raise ValueError(f"a table is quantized along axis {table.axis}, expected -1: its rows are read one by one")
