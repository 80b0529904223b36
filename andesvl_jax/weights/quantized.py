"""Integer weights as leaves: simulated (`FakeQuantized`, trainable) and stored (`Packed`), with one rounding rule for both.

Symmetric, narrow range: code = round(w / scale) in [-(2^(bits-1) - 1), 2^(bits-1) - 1], scale = max |w| over a group.
Groups run along the contracted axis: axis -2 of a matrix [..., i, o], axis -1 of a table [E, D].
"""

import jax
import jax.numpy as jnp
from flax import struct

from andesvl_jax.weights.leaf import Leaf, dense, is_leaf, leaf_kind, lookup, map_leaves


@leaf_kind
@struct.dataclass
class FakeQuantized:
    """A float leaf that acts as its quantized self; gradients pass straight through to `weight`."""

    weight: Leaf
    bits: int = struct.field(pytree_node=False)
    group: int | None = struct.field(pytree_node=False, default=None)  # None: one scale per output channel
    axis: int = struct.field(pytree_node=False, default=-2)


@leaf_kind
@struct.dataclass
class Packed:
    """codes: int8 (8 bits) or uint8 with two 4-bit codes per byte along `axis`; scale: float32, one per group along `axis`."""

    codes: jax.Array
    scale: jax.Array
    bits: int = struct.field(pytree_node=False)
    axis: int = struct.field(pytree_node=False, default=-2)


@dense.register(FakeQuantized)
def _(w: FakeQuantized, dtype=None):
    weight = dense(w.weight)
    simulated = dense(quantize(jax.lax.stop_gradient(weight), w.bits, w.group, w.axis), weight.dtype)
    straight_through = simulated + (weight - jax.lax.stop_gradient(weight))  # + 0 keeps the value bit-exact
    return straight_through if dtype is None else straight_through.astype(dtype)


@dense.register(Packed)
def _(w: Packed, dtype=None):
    value = _dequantize(w.codes, w.scale, w.bits, w.axis)
    return value if dtype is None else value.astype(dtype)


@lookup.register(Packed)
def _(w: Packed, ids, dtype):
    _require_rows(w)
    rows = jnp.take(w.codes, ids, axis=0), jnp.take(w.scale, ids, axis=0)
    return _dequantize(*rows, w.bits, -1).astype(dtype)


@lookup.register(FakeQuantized)
def _(w: FakeQuantized, ids, dtype):
    _require_rows(w)
    return jnp.take(dense(w), ids, axis=0).astype(dtype)


def _require_rows(table: FakeQuantized | Packed) -> None:
    if table.axis != -1:
        raise ValueError(f"a table is quantized along axis {table.axis}, expected -1: its rows are read one by one")


def quantize(weight: jax.Array, bits: int, group: int | None = None, axis: int = -2) -> Packed:
    """float [..., i, o] -> Packed with 8- or 4-bit codes and a float32 scale per group.

    Raises ValueError for other bit widths, a group that does not divide the axis, or an odd axis at 4 bits.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}, expected 4 or 8")
    w = jnp.moveaxis(weight.astype(jnp.float32), axis, -1)
    size = w.shape[-1]
    group = size if group is None else group
    if group < 1 or size % group or (bits == 4 and size % 2):
        raise ValueError(f"axis of {size} weights cannot be cut into groups of {group} at {bits} bits")
    limit = 2 ** (bits - 1) - 1
    grouped = w.reshape(*w.shape[:-1], size // group, group)
    scale = jnp.maximum(jnp.abs(grouped).max(-1) / limit, jnp.finfo(jnp.float32).tiny)  # runtimes refuse a zero scale
    codes = jnp.clip(jnp.round(grouped / scale[..., None]), -limit, limit).astype(jnp.int8).reshape(w.shape)
    if bits == 4:
        pairs = codes.astype(jnp.uint8).reshape(*w.shape[:-1], size // 2, 2)
        codes = (pairs[..., 0] & 15) | (pairs[..., 1] << 4)
    return Packed(jnp.moveaxis(codes, -1, axis), jnp.moveaxis(scale, -1, axis), bits, axis)


def _dequantize(codes, scale, bits: int, axis: int) -> jax.Array:
    codes, scale = jnp.moveaxis(codes, axis, -1), jnp.moveaxis(scale, axis, -1)
    if bits == 4:
        low, high = codes << 4, codes  # arithmetic shift right of the int8 view sign-extends the upper nibble
        pairs = jnp.stack([low, high], -1).astype(jnp.int8) >> 4
        codes = pairs.reshape(*codes.shape[:-1], -1)
    groups = codes.reshape(*scale.shape, -1).astype(jnp.float32) * scale[..., None]
    return jnp.moveaxis(groups.reshape(codes.shape), -1, axis)


def quantize_leaves(params, pattern: str, bits: int, group: int | None = None, axis: int = -2):
    """Matched leaves -> Packed."""
    return map_leaves(lambda w: quantize(dense(w), bits, group, axis), params, pattern)


def simulate_leaves(params, pattern: str, bits: int, group: int | None = None, axis: int = -2):
    """Matched leaves -> FakeQuantized: the forward of `quantize_leaves`, with gradients."""
    return map_leaves(lambda w: FakeQuantized(w, bits, group, axis), params, pattern)


def pack_leaves(params):
    """Every FakeQuantized leaf -> the Packed leaf it simulates."""

    def pack(w):
        return quantize(dense(w.weight), w.bits, w.group, w.axis) if isinstance(w, FakeQuantized) else w

    return jax.tree.map(pack, params, is_leaf=is_leaf)
