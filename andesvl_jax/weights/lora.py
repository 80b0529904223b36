"""LoRA as a weight leaf: W -> W + (alpha / rank) A B, one adapter or a stack of which each batch row picks one by index.

Letters: A adapters, r rank, i/o input and output width, B batch rows. A leading layer axis is there until `lax.scan` slices it.
"""

import jax
import jax.numpy as jnp
from flax import struct

from andesvl_jax.errors import UserError
from andesvl_jax.weights.leaf import Leaf, dense, dot, is_leaf, leaf_kind, map_leaves, multiply, path_name

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


@multiply.register(LoRA)
def _(w: LoRA, x):
    y = dot(x, w.base)
    a, b, scale = w.a.astype(x.dtype), w.b.astype(x.dtype), w.scale.astype(x.dtype)
    if w.ids is None:
        return y + scale * ((x @ a) @ b)
    low = jnp.einsum("b...i,bir->b...r", x, a[w.ids])
    delta = jnp.einsum("b...r,bro->b...o", low, b[w.ids])
    return y + scale[w.ids].reshape(-1, *[1] * (x.ndim - 1)) * delta


@dense.register(LoRA)
def _(w: LoRA, dtype=None):
    if w.ids is not None:
        raise ValueError("a stack of adapters has no single dense weight; take one adapter with `one_adapter` first")
    base = dense(w.base, dtype)
    return base + (w.scale[..., None, None] * (w.a @ w.b)).astype(base.dtype)


def add_lora(params, key: jax.Array, rank: int, alpha: float, pattern: str = DECODER_MATRICES):
    """Wraps each matched matrix leaf in a new adapter that changes nothing yet: a ~ N(0, 1/i), b = 0."""

    def wrap(w: Leaf, key: jax.Array) -> LoRA:
        *lead, i, o = jax.eval_shape(dense, w).shape
        a = jax.random.normal(key, (*lead, i, rank)) * i**-0.5
        return LoRA(w, a, jnp.zeros((*lead, rank, o)), jnp.full(lead, alpha / rank))

    return map_leaves(wrap, params, pattern, extra=key)


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
        join = lambda name: jnp.stack([getattr(w, name) for w in leaves], axis)  # noqa: E731
        ids = jnp.broadcast_to(batch_ids, (*first.scale.shape, *batch_ids.shape))
        return LoRA(first.base, join("a"), join("b"), join("scale"), ids)

    return jax.tree_util.tree_map_with_path(stack, *adapters, is_leaf=is_leaf)


def _require_same(name: str, what: str, values) -> None:
    """Values are compared only where they are not one array already, as adapters over one loaded base share it."""
    for other in values[1:]:
        for x, y in zip(jax.tree.leaves(values[0]), jax.tree.leaves(other), strict=True):
            if x is not y and (x.shape != y.shape or x.dtype != y.dtype or not bool(jnp.array_equal(x, y))):
                raise UserError(f"weights {name}: the adapters have different {what}s, expected one {what} under all of them.")
