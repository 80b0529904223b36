"""LoRA as a weight leaf: W -> W + (alpha / rank) A B, one adapter or a stack of which each batch row picks one by index.

Letters: A adapters, r rank, i/o input and output width, B batch rows. A leading layer axis is there until `lax.scan` slices it.
"""

import jax
import jax.numpy as jnp
from flax import struct

from andesvl_jax.errors import UserError
from andesvl_jax.weights.leaf import Leaf, apply, dense, is_leaf, leaf_kind, output_range, path_name, requantize

DECODER_MATRICES = r"decoder\.layers\.(\d+\.)?(q|k|v|o|gate|up|down)"
ALL_MATRICES = (
    r"decoder\.layers\.(\d+\.)?(q|k|v|o|gate|up|down)|vision\.layers\.(\d+\.)?(qkv|proj|fc1|fc2|fc3)|projector\.(fc1|fc2)"
)


@leaf_kind
@struct.dataclass
class LoRA:
    """base [i, o]; one adapter: a [i, r], b [r, o], scale []; a stack: a [A, i, r], b [A, r, o], scale [A] and ids [B]."""

    base: Leaf
    a: jax.Array
    b: jax.Array
    scale: jax.Array  # alpha / rank
    ids: jax.Array | None = None


@apply.register(LoRA)
def _(w: LoRA, x, bias=None):
    y = apply(w.base, x, bias)
    a, b, scale = dense(w.a, x.dtype), dense(w.b, x.dtype), w.scale.astype(x.dtype)
    if w.ids is None:
        delta = scale * ((x @ a) @ b)
    else:
        low = jnp.einsum("b...i,bir->b...r", x, a[w.ids])
        delta = scale[w.ids].reshape(-1, *[1] * (x.ndim - 1)) * jnp.einsum("b...r,bro->b...o", low, b[w.ids])
    return requantize(w.base, y + requantize(w.base, delta))


@output_range.register(LoRA)
def _(w: LoRA):
    return output_range(w.base)


@requantize.register(LoRA)
def _(w: LoRA, y):
    return requantize(w.base, y)


@dense.register(LoRA)
def _(w: LoRA, dtype=None):
    if w.ids is not None:
        raise ValueError("a stack of adapters has no single dense weight; take one adapter with `one_adapter` first")
    base = dense(w.base, dtype)
    return base + (w.scale[..., None, None] * (w.a @ w.b)).astype(base.dtype)


def merge_lora(params):
    """Folds every single adapter into its base: LoRA leaves become dense arrays."""
    return jax.tree.map(lambda w: dense(w) if isinstance(w, LoRA) else w, params, is_leaf=is_leaf)


def stack_adapters(adapters, batch_ids: jax.Array):
    """Params trees that differ only in their adapters -> one tree whose row b of a batch runs adapter batch_ids[b].

    Args:
      adapters: trees with single LoRA leaves of equal rank over the same base; batch_ids int32 [B].
    Raises:
      UserError: no adapter, or trees that differ in more than the adapters' values: other weights, places or ranks.
    """
    if not adapters:
        raise UserError("there is no adapter to stack, expected at least one.")
    trees = {jax.tree.structure(tree) for tree in adapters}
    if len(trees) > 1:
        raise UserError("the adapters sit on different weights or on bases of another kind, expected the same for all of them.")

    def stack(path, *leaves):
        first, name = leaves[0], path_name(path)
        if not isinstance(first, LoRA):
            _require_same(name, "weight", leaves)
            return first
        if any(w.ids is not None for w in leaves):
            raise UserError(f"weights {name}: found a stack of adapters, expected single ones.")
        ranks = [w.a.shape[-1] for w in leaves]
        if len(set(ranks)) > 1:
            raise UserError(f"weights {name}: the adapters have ranks {', '.join(map(str, ranks))}, expected one rank for all.")
        _require_same(name, "base", [w.base for w in leaves])
        axis = first.scale.ndim  # behind the layer axis, if there is one
        a, b, scale = (jnp.stack([getattr(w, part) for w in leaves], axis) for part in ("a", "b", "scale"))
        return LoRA(first.base, a, b, scale, jnp.broadcast_to(batch_ids, (*first.scale.shape, *batch_ids.shape)))

    return jax.tree_util.tree_map_with_path(stack, *adapters, is_leaf=is_leaf)


def _require_same(name: str, what: str, values) -> None:
    """Values are compared only where they are not one array already, as adapters over one loaded base share it."""
    for other in values[1:]:
        for x, y in zip(jax.tree.leaves(values[0]), jax.tree.leaves(other), strict=True):
            if x is not y and (x.shape != y.shape or x.dtype != y.dtype or not bool(jnp.array_equal(x, y))):
                raise UserError(f"weights {name}: the adapters have different {what}s, expected one {what} under all of them.")
