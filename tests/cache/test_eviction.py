"""Scorers against brute force, and what any policy must respect: budgets, sinks, the window, rows that do not meet."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from andesvl_jax.cache.eviction import POLICIES, Eviction, LayerView, kept_slots
from andesvl_jax.errors import UserError

B, K, G, W, C, H, D = 3, 2, 2, 8, 64, 4, 10
LENGTHS = np.array([64, 41, 5])  # a full bucket, a partial one, a prompt shorter than the window


@functools.partial(jax.jit, static_argnames="eviction")
def evict(view: LayerView, length, eviction: Eviction):
    """keys, values [B, K, C', H] and positions [B, K, C'] of what stays."""
    index = kept_slots(view, length, eviction)
    gather = lambda x: jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 3)), 2)  # noqa: E731
    return gather(view.keys), gather(view.values), jnp.where(index >= 0, gather(view.positions), -1)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def random_view(width: int = C, rows=range(B), seed: int = 0, skew: float = 1.0) -> tuple[LayerView, dict]:
    """A prefilled layer and the NumPy numbers it comes from. Row contents do not depend on `width` or on the other rows;
    `skew` makes the values of the first head larger, so that an adaptive policy wants all its slots there."""
    positions, queries = np.full((B, K, width), -1), np.full((B, W), -1)
    keys, values = np.zeros((B, K, width, H)), np.zeros((B, K, width, H))
    weights, w_o = np.zeros((B, K, G, W, width)), np.random.default_rng(seed + 99).normal(size=(K, G, H, D))
    for b in range(B):
        rng, n = np.random.default_rng(seed + b), LENGTHS[b]
        positions[b, :, :n] = np.arange(n)
        queries[b, max(W - n, 0) :] = np.arange(max(n - W, 0), n)
        keys[b, :, :n], values[b, :, :n] = rng.normal(size=(2, K, n, H))
        values[b, 0] *= skew
        for k in range(K):
            for g in range(G):
                for w in range(max(W - n, 0), W):
                    weights[b, k, g, w, : queries[b, w] + 1] = softmax(rng.normal(size=queries[b, w] + 1))
    rows = list(rows)
    arrays = [keys[rows], values[rows], positions[rows], weights[rows], queries[rows], np.einsum("kghd,kgid->kghi", w_o, w_o)]
    kinds = [np.float32, np.float32, np.int32, np.float32, np.int32, np.float32]
    return LayerView(*(jnp.asarray(a, t) for a, t in zip(arrays, kinds, strict=True))), {"w": weights, "v": values, "w_o": w_o}


def test_snapkv_scores_equal_the_published_formula():
    view, raw = random_view()
    found = np.asarray(POLICIES["snapkv"](view))
    for b in range(B):
        n = LENGTHS[b]
        window = min(W, n)
        for k in range(K):
            earlier = raw["w"][b, k, :, W - window :, : n - window].mean(1)  # over queries, keys of the window dropped
            padded = np.pad(earlier, ((0, 0), (2, 2)))
            pooled = np.array([[padded[g, c : c + 5].sum() / 5 for c in range(n - window)] for g in range(G)])
            # float32 means of 16 probabilities
            np.testing.assert_allclose(found[b, k, : n - window], pooled.mean(0).reshape(-1), rtol=1e-5, atol=1e-8)


def test_okv_scores_equal_leaving_each_slot_out_for_real():
    view, raw = random_view()
    found = np.asarray(POLICIES["okv"](view), np.float64)
    for b, k, c in np.ndindex(B, K, C):
        if c >= LENGTHS[b] - 1:
            continue  # the last key of a prompt is all that some query of a short row sees: nothing is left without it
        change = 0.0
        for g, w in np.ndindex(G, W):
            p = raw["w"][b, k, g, w]
            if not p.any() or p[c] > 0.99:
                continue
            rest = p.copy()
            rest[c] = 0
            moved = (rest / rest.sum() - p) @ raw["v"][b, k] @ raw["w_o"][k, g]
            change += moved @ moved
        if max(raw["w"][b, k, :, :, c].max(), 0) <= 0.99:
            # |v|^2 - 2 v.o + |o|^2 in float32 cancels where v and o are close: 1e-4 of the row's largest score
            assert abs(found[b, k, c] - change) <= 1e-4 * change + 1e-5 * found[b, k].max(), (b, k, c)


def test_streaming_prefers_the_latest():
    view, _ = random_view()
    assert (np.diff(np.asarray(POLICIES["streaming"](view))[0], axis=-1) > 0).all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", [0.1, 0.15, 0.5, 0.73, 1.0, 3, 20, 500])
@pytest.mark.parametrize("skew", [1.0, 100.0])
def test_budgets_sinks_and_window_are_respected(policy, budget, skew):
    eviction = Eviction(policy, budget, window=W)
    view, _ = random_view(seed=4, skew=skew)
    keys, values, positions = map(np.asarray, evict(view, jnp.asarray(LENGTHS), eviction))
    share = Fraction(str(budget))
    expected = [min(n, budget) if isinstance(budget, int) else math.ceil(n * share) for n in LENGTHS.tolist()]
    allocated = min(C, budget) if isinstance(budget, int) else math.ceil(C * share)
    assert keys.shape == values.shape == (*positions.shape, H)
    assert positions.shape[-1] <= min(C, math.ceil(1.25 * allocated))
    for b in range(B):
        kept = [positions[b, k][positions[b, k] >= 0] for k in range(K)]
        if policy == "okv":  # one budget, split between the heads
            assert sum(map(len, kept)) == expected[b] * K
            assert all(math.ceil(0.2 * expected[b]) <= len(head) <= math.ceil(1.25 * expected[b]) for head in kept)
        else:
            assert [len(head) for head in kept] == [expected[b]] * K
        for k, head in enumerate(kept):
            assert (np.diff(head) > 0).all()  # in the old order, none twice
            np.testing.assert_array_equal(values[b, k][positions[b, k] >= 0], np.asarray(view.values)[b, k, head])
            np.testing.assert_array_equal(keys[b, k][positions[b, k] >= 0], np.asarray(view.keys)[b, k, head])
            if policy != "okv" or len(head) >= expected[b]:  # a head that got less may have room for fewer of them
                sinks, window = min(eviction.sinks, expected[b] // 4), min(W, expected[b] // 2)
                assert set(range(sinks)) | set(range(LENGTHS[b] - window, LENGTHS[b])) <= set(head.tolist())


@pytest.mark.parametrize("policy", POLICIES)
def test_the_highest_scores_stay(policy):
    eviction = Eviction(policy, 0.5, window=W)
    view, _ = random_view(seed=7)
    scores = np.asarray(POLICIES[policy](view))
    positions = np.asarray(evict(view, jnp.asarray(LENGTHS), eviction)[2])
    for b in range(2):
        candidates = np.arange(4, LENGTHS[b] - W)  # neither sinks nor window
        kept = [np.isin(candidates, positions[b, k]) for k in range(K)]
        for k in range(K):
            assert scores[b, k, candidates][kept[k]].min() >= scores[b, k, candidates][~kept[k]].max()
        if policy == "okv":  # and across heads, as far as each one's share and store allow
            total = np.ceil(LENGTHS[b] / 2)
            free = [k for k in range(K) if (positions[b, k] >= 0).sum() > math.ceil(0.2 * total)]
            room = [k for k in range(K) if (positions[b, k] >= 0).sum() < math.ceil(1.25 * total)]
            for giver in free:
                for taker in room:
                    assert scores[b, giver, candidates][kept[giver]].min() >= scores[b, taker, candidates][~kept[taker]].max()


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_row_keeps_depends_on_no_other_row_and_on_no_padding(policy):
    eviction = Eviction(policy, 0.3, window=W)
    together = np.asarray(evict(random_view()[0], jnp.asarray(LENGTHS), eviction)[2])
    wide = np.asarray(evict(random_view(width=96)[0], jnp.asarray(LENGTHS), eviction)[2])
    for b in range(B):
        alone = np.asarray(evict(random_view(rows=[b])[0], jnp.asarray(LENGTHS[b : b + 1]), eviction)[2])[0]
        for k in range(K):
            sets = [x[x >= 0].tolist() for x in (together[b, k], wide[b, k], alone[k])]
            assert sets[0] == sets[1] == sets[2]


def test_a_tiny_budget_is_shared_by_all_heads():
    view, _ = random_view()
    positions = np.asarray(evict(view, jnp.asarray(LENGTHS), Eviction("okv", 2, window=W))[2])
    assert ((positions >= 0).sum(-1) >= 1).all()


@pytest.mark.parametrize("budget", [0.0, 1.5, 0, -3, float("nan")])
def test_impossible_budgets_are_refused(budget):
    with pytest.raises(UserError, match="kv_budget"):
        Eviction("okv", budget)


def test_an_unknown_policy_is_refused():
    with pytest.raises(UserError, match="kv_policy is 'nonesuch', expected one of okv"):
        Eviction("nonesuch", 0.5)
