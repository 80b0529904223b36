"""KV eviction: a scorer says how much each slot of a layer matters; the best stay in a smaller cache of static shape.

A policy is a pure function score(view) -> float32 [B, K, C], higher = keep. The project's "okv" is its own algorithm: what
AndesVL calls OKV is unpublished (arXiv 2510.11496 gives its name and no formula).

B batch rows, N query heads, K kv heads, G = N / K, C cache slots, H head width, W observed queries.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Callable

import jax
import jax.numpy as jnp
from flax import struct

from andesvl_jax.errors import UserError

STORE_FACTOR = Fraction(5, 4)  # slots per head of the rectangular store, in budgets, when heads may differ in what they keep
HEAD_SHARE = Fraction(1, 5)  # of the budget that every head keeps in any case (Ada-KV's alpha)
SNAPKV_KERNEL = 5
_EMPTY, _SCORED, _WINDOW, _SINK, _SHARE = range(-1, 4)  # what outranks what, whatever the scores


@struct.dataclass
class LayerView:
    """What a scorer sees of one layer. keys, values: [B, K, C, H]; positions: int32 [B, K, C], -1 = empty; weights: float32
    [B, K, G, W, C], attention of the last W queries, 0 where a row has fewer; query_positions: int32 [B, W], -1 = none;
    output: float32 [K, G, H, H], Gram matrix W_o W_o^T of each query head's rows of the output projection, where needed."""

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    weights: jax.Array
    query_positions: jax.Array
    output: jax.Array | None


def streaming(view: LayerView) -> jax.Array:
    """StreamingLLM (2309.17453): the most recent tokens; sinks are protected by `keep_mask`. Original positions are kept."""
    return view.positions.astype(jnp.float32)


def snapkv(view: LayerView) -> jax.Array:
    """SnapKV (2404.14469) as kvpress computes it: attention of the last W queries on earlier keys, averaged over them,
    average-pooled over 5 slots, averaged over the query heads of a group."""
    observed = jnp.maximum((view.query_positions >= 0).sum(-1), 1)
    window = view.query_positions[:, None, :, None] == view.positions[:, :, None]
    earlier = jnp.where(window.any(2), 0.0, (view.weights.sum(3) / observed[:, None, None, None]).mean(2))
    return _average_pool(earlier, SNAPKV_KERNEL)


def okv(view: LayerView) -> jax.Array:
    """Output-aware one-pass score: the squared change of the layer's output, were this slot alone left out.

    Leaving key j out of query i's softmax moves head output o_i to (o_i - p_ij v_j) / (1 - p_ij), a change of
    p_ij / (1 - p_ij) (o_i - v_j). Its squared norm after the output projection, summed over the observed queries and the
    heads of the group, is comparable across heads, so one budget can be split between them. Needs no second pass.
    """
    p = view.weights
    values = view.values.astype(jnp.float32)
    outputs = jnp.einsum("bkgwc,bkch->bkgwh", p, values)
    projected = jnp.einsum("bkgwh,kghi->bkgwi", outputs, view.output)
    of_values = jnp.einsum("bkch,kghi,bkci->bkgc", values, view.output, values)
    of_outputs = jnp.einsum("bkgwh,bkgwh->bkgw", projected, outputs)
    cross = jnp.einsum("bkgwi,bkci->bkgwc", projected, values)
    distance = jnp.maximum(of_values[:, :, :, None] - 2 * cross + of_outputs[..., None], 0.0)
    odds = p / jnp.maximum(1.0 - p, 1e-3)
    return jnp.einsum("bkgwc,bkgwc->bkc", jnp.square(odds), distance)


POLICIES: dict[str, Callable[[LayerView], jax.Array]] = {"okv": okv, "snapkv": snapkv, "streaming": streaming}
HEAD_ADAPTIVE = {"okv"}  # scores that are comparable across heads


@dataclass(frozen=True)
class Eviction:
    """How much of the cache stays after a prefill: `budget` is a fraction of each row's prompt (float) or slots (int)."""

    policy: str = "okv"
    budget: float | int = 0.5
    window: int = 16  # last queries whose attention is observed; their keys stay, up to half of the budget
    sinks: int = 4  # first tokens, which stay, up to a quarter of the budget

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise UserError(f"kv_policy is {self.policy!r}, expected one of {', '.join(POLICIES)}.")
        if not (0 < self.budget <= 1 if isinstance(self.budget, float) else self.budget >= 1):
            raise UserError(f"kv_budget is {self.budget}, expected a fraction in (0, 1] or at least 1 slot.")

    @property
    def needs_output(self) -> bool:
        """Whether the policy weighs values by the output projection."""
        return self.policy == "okv"

    @property
    def share(self) -> Fraction | None:
        """The budget as a ratio of integers (in floating point 0.15 x 100 may round up to 16); None: it is in slots."""
        if not isinstance(self.budget, float):
            return None
        return max(Fraction(self.budget).limit_denominator(10_000), Fraction(1, 10_000))

    def kept(self, length: jax.Array) -> jax.Array:
        """int32 [B]: slots per head that stay, on average over the heads, of prompts of this length [B]."""
        return jnp.minimum(length, self.budget) if self.share is None else _part(length, self.share)

    def store(self, kept):
        """Slots that one head may fill when `kept` (an int or an array) stay on average."""
        return _part(kept, STORE_FACTOR) if self.policy in HEAD_ADAPTIVE else kept

    def slots(self, width: int) -> int:
        """Slots allocated per head for prompts in a bucket of `width`: never more than the prompt has."""
        return min(width, self.store(self.budget if self.share is None else _part(width, self.share)))


def _part(n, ratio: Fraction):
    """ceil(n * ratio), exactly, for an int or an int32 array."""
    return -(-n * ratio.numerator // ratio.denominator)


def kept_slots(view: LayerView, length, eviction: Eviction) -> jax.Array:
    """int32 [B, K, C']: the slots that stay, in their old order, -1 behind them: what `cache.kv.select` takes.

    Args:
      length: int32 [B], tokens of each row's prompt.
    """
    slots = eviction.slots(view.positions.shape[-1])
    keep = keep_mask(view, POLICIES[eviction.policy](view), length, eviction)
    size = keep.shape[-1]
    order = jnp.where(keep, size - jnp.arange(size), 0)  # top_k of this picks the kept slots, earliest first
    rank, index = jax.lax.top_k(order, slots)
    return jnp.where(rank > 0, index, -1)


def keep_mask(view: LayerView, scores: jax.Array, length, eviction: Eviction) -> jax.Array:
    """bool [B, K, C]: what stays. Sinks come first, then the observation window, latest first, then the highest scores.

    Everything depends on the row alone: neither the bucket nor the other rows of the batch change what it keeps.
    """
    positions = view.positions
    budget = eviction.kept(length)[:, None, None]
    window, sinks = jnp.minimum(eviction.window, budget // 2), jnp.minimum(eviction.sinks, budget // 4)
    tier = jnp.where(positions >= length[:, None, None] - window, _WINDOW, _SCORED)
    tier = jnp.where(positions < sinks, _SINK, tier)
    tier = jnp.where(positions < 0, _EMPTY, tier)
    place = positions.astype(scores.dtype)
    scores = jnp.select([tier == _SINK, tier == _WINDOW], [-place, place], scores)
    within = _rank(tier, scores)
    if eviction.policy not in HEAD_ADAPTIVE:
        return (within < budget) & (positions >= 0)
    share = _part(budget, HEAD_SHARE)
    storable = (within < eviction.store(budget)) & (positions >= 0)
    scores = jnp.where(tier == _SCORED, scores, -within.astype(scores.dtype))  # too small a budget is shared out evenly
    tier = jnp.where(storable, jnp.where(within < share, _SHARE, tier), _EMPTY)
    rows, heads, size = scores.shape
    flat = lambda x: x.reshape(rows, 1, heads * size)  # noqa: E731
    across = _rank(flat(tier), flat(scores)).reshape(scores.shape)
    return (across < budget * heads) & storable


def _rank(tier: jax.Array, scores: jax.Array) -> jax.Array:
    """int32, 0 = the best score of the highest tier along the last axis; equals rank in slot order."""
    order = jnp.lexsort((-scores, -tier), axis=-1)
    return jnp.argsort(order, axis=-1)


def _average_pool(x: jax.Array, kernel: int) -> jax.Array:
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(kernel // 2, kernel // 2)])
    return sum(padded[..., i : i + x.shape[-1]] for i in range(kernel)) / kernel
