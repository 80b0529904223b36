"""One table: every representation of a weight against everything the network does with weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import max_relative, random_sample, tiny_batch, tiny_config, tiny_params, worst_leaf

from andesvl_jax.model.andesvl import forward, unstack_layers
from andesvl_jax.model.decoder import logits
from andesvl_jax.weights import (
    ALL_MATRICES,
    Adapt,
    FakeQuantized,
    Int4,
    Int8,
    LoRA,
    Packed,
    Rule,
    Scheme,
    Simulate,
    Ternary,
    apply,
    dense,
    is_leaf,
    map_leaves,
    merge_lora,
    pack,
    pack_leaves,
    path_name,
    represent,
    stack_adapters,
)

CONFIG = tiny_config("aimv2", vision={"num_layers": 1}, text={"tie_word_embeddings": False})
TABLES = r"decoder\.(embedding|head)"
SHIFTS = (0, 6)
TOLERANCE = 2e-5  # the same float32 numbers multiplied and summed in another order
GRADIENT_TOLERANCE = 1e-4  # the gradient of a scale sums hundreds of products that partly cancel


def lora(w, seed: int = 0, alpha: float = 6.0) -> LoRA:
    """The leaf with a rank-3 adapter that does change something."""
    rng, (*lead, i, o) = np.random.default_rng(seed), jax.eval_shape(dense, w).shape
    normal = lambda *shape: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)  # noqa: E731
    return LoRA(w, normal(*lead, i, 3), normal(*lead, 3, o), jnp.full(lead, alpha / 3))


KINDS = {
    "dense": lambda w: w,
    "lora": lora,
    "fake int8": lambda w: FakeQuantized(w, Int8()),
    "fake int4": lambda w: FakeQuantized(w, Int4()),
    "fake int8, groups": lambda w: FakeQuantized(w, Int8(8)),
    "fake int4, groups": lambda w: FakeQuantized(w, Int4(8)),
    "fake ternary": lambda w: FakeQuantized(w, Ternary(8)),
    "packed int8": lambda w: pack(w, Int8()),
    "packed int4": lambda w: pack(w, Int4()),
    "packed int4, groups": lambda w: pack(w, Int4(8)),
    "packed ternary": lambda w: pack(w, Ternary(8)),
    "lora over packed int4": lambda w: lora(pack(w, Int4(8))),
    "lora over fake int8": lambda w: lora(FakeQuantized(w, Int8())),
}
TABLE_KINDS = [
    lambda w: pack(w, Int8(), axis=-1),
    lambda w: pack(w, Ternary(8), axis=-1),
    lambda w: FakeQuantized(w, Int4(8), axis=-1),
]


def mixed(params, shift: int):
    """Every matrix in another representation, all of them in one network; `shift` moves who gets which."""
    kinds = itertools.cycle([*KINDS.values()][shift:] + [*KINDS.values()][:shift])
    tables = itertools.cycle(TABLE_KINDS[shift % 3 :])
    params = map_leaves(lambda w: next(kinds)(w), params, ALL_MATRICES)
    return map_leaves(lambda w: next(tables)(w), params, TABLES)


def adapted(params, seed: int, alpha: float = 6.0):
    return map_leaves(lambda w: lora(w, seed, alpha), params, ALL_MATRICES)


def simulated(params, scheme: Scheme):
    rules = [Rule(ALL_MATRICES, Simulate(scheme)), Rule(TABLES, Simulate(scheme, axis=-1))]
    return represent(params, rules)


def batch():
    rng = np.random.default_rng(0)
    samples = [random_sample(CONFIG, rng, grids) for grids in (((2, 4), (4, 2)), (), ((4, 4),))]
    return tiny_batch(CONFIG, [samples[:2], samples[2:]], tokens=32, patches=24)


def forward_scores(params, batch, config=CONFIG):
    """float32 [2, T, V] for the batch; padding slots, where nothing is promised, are zero."""
    return logits(params.decoder, forward(params, config, batch)) * (batch.positions >= 0)[..., None]


@jax.jit
def scores(params):
    return forward_scores(params, batch())


@jax.jit
def unrolled_scores(params):
    unrolled, config = unstack_layers(params, CONFIG)
    return forward_scores(unrolled, batch(), config)


@jax.jit
def scores_and_gradient(params):
    """Scores, and gradients of a function of them for the float arrays of any representation (zeros for integer ones)."""

    def loss(params):
        found = forward_scores(params, batch())
        return jnp.sum(found * jnp.cos(jnp.arange(found.size)).reshape(found.shape)), found

    gradient, found = jax.grad(loss, has_aux=True, allow_int=True)(params)
    return found, without_integers(gradient, params)


@jax.jit
def as_dense(params):
    return jax.tree.map(dense, params, is_leaf=is_leaf)


@jax.jit
def pulled_back(params, cotangent):
    """The chain rule through `dense`, for the float arrays of a representation."""

    def product(params):
        return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(as_dense(params)), jax.tree.leaves(cotangent), strict=True))

    return without_integers(jax.grad(product, allow_int=True)(params), params)


def without_integers(gradient, params):
    return jax.tree.map(lambda g, p: jnp.zeros(p.shape) if g.dtype == jax.dtypes.float0 else g, gradient, params)


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_network_treats_each_representation_as_the_weights_it_stands_for(shift):
    plain = tiny_params(CONFIG)
    params = mixed(plain, shift)
    found, gradient = scores_and_gradient(params)
    stands_for = as_dense(params)
    expected, dense_gradient = scores_and_gradient(stands_for)
    assert max_relative(found, expected) <= TOLERANCE
    assert max_relative(unrolled_scores(params), expected) <= TOLERANCE  # unrolled layers equal scanned ones
    assert max_relative(found, scores_and_gradient(plain)[0]) > 1e-2  # and they are not what they were made from
    worst, where = worst_leaf(gradient, pulled_back(params, dense_gradient))
    assert worst <= GRADIENT_TOLERANCE, where


def test_the_table_of_representations_is_complete():
    """Between them the two mixed networks above hold every kind, and a matrix of each part in several."""
    found = set()
    for shift in SHIFTS:
        leaves = jax.tree.leaves(mixed(tiny_params(CONFIG), shift), is_leaf=is_leaf)
        nested = [w.base for w in leaves if isinstance(w, LoRA)]
        for w in [*leaves, *nested]:
            scheme = getattr(w, "scheme", None)
            found.add((type(w), type(scheme), getattr(scheme, "group", None) is not None))
    every = {(kind, scheme) for kind in (Packed, FakeQuantized) for scheme in (Int8, Int4, Ternary)}
    assert {(LoRA, type(None))} | every <= {(kind, scheme) for kind, scheme, _ in found}
    assert {(FakeQuantized, Int8, True), (FakeQuantized, Int4, True), (Packed, Int4, False)} <= found


@pytest.mark.parametrize("scheme", [Int8(), Int8(8), Int4(), Int4(8), Ternary(), Ternary(8)], ids=str)
def test_fake_quantization_equals_the_packed_weights_bit_for_bit(scheme):
    params = simulated(tiny_params(CONFIG), scheme)
    packed = pack_leaves(params)
    assert not any(isinstance(w, FakeQuantized) for w in jax.tree.leaves(packed, is_leaf=is_leaf))
    for fake, real in zip(jax.tree.leaves(as_dense(params)), jax.tree.leaves(as_dense(packed)), strict=True):
        np.testing.assert_array_equal(fake, real)


def test_training_through_fake_quantization_is_straight_through():
    params = simulated(tiny_params(CONFIG), Int4(8))
    found, gradient = scores_and_gradient(params)
    expected, at_packed = scores_and_gradient(as_dense(pack_leaves(params)))
    assert max_relative(found, expected) <= TOLERANCE
    of_weights = jax.tree.map(lambda w: w.weight if isinstance(w, FakeQuantized) else w, gradient, is_leaf=is_leaf)
    worst, where = worst_leaf(of_weights, at_packed)
    assert worst <= GRADIENT_TOLERANCE, where


def test_adapters_picked_by_index_equal_each_adapter_alone():
    params = tiny_params(CONFIG)
    adapters = [adapted(params, seed, alpha) for seed, alpha in ((1, 6.0), (2, 3.0), (3, 9.0))]
    alone = [scores(adapter) for adapter in adapters]
    for ids in ([2, 0], [0, 2], [1, 1]):
        found, gradient = scores_and_gradient(stack_adapters(adapters, jnp.array(ids, jnp.int32)))
        for row, adapter in enumerate(ids):
            assert max_relative(found[row], alone[adapter][row]) <= TOLERANCE, ids
        learns = jnp.abs(gradient.decoder.layers.q.b).max(axis=(0, 2, 3)) > 0  # [L, A, r, o]: only adapters in use learn
        assert learns.tolist() == [adapter in ids for adapter in range(3)]
    stacked = stack_adapters(adapters, jnp.array([2, 0], jnp.int32))
    assert max_relative(unrolled_scores(stacked)[0], alone[2][0]) <= TOLERANCE
    assert max_relative(alone[0][0], alone[1][0]) > 1e-3  # the adapters do differ


def test_a_new_adapter_changes_nothing_bit_for_bit():
    params = tiny_params(CONFIG)
    fresh, other = (represent(params, [Rule(ALL_MATRICES, Adapt(4, 8.0))], jax.random.key(seed)) for seed in (5, 6))
    for leaf in jax.tree.leaves(fresh, is_leaf=is_leaf):
        if isinstance(leaf, LoRA):
            leaf = jax.tree.map(lambda a: a[0], leaf) if leaf.scale.ndim else leaf  # a scan hands out one layer at a time
            x = jax.random.normal(jax.random.key(0), (3, leaf.a.shape[-2]))
            np.testing.assert_array_equal(apply(leaf, x), apply(leaf.base, x))
            np.testing.assert_array_equal(dense(leaf), leaf.base)
    # whole networks are compared within one program, because XLA may round two different programs differently
    np.testing.assert_array_equal(scores(fresh), scores(other))
    assert max_relative(scores(fresh), scores(params)) <= TOLERANCE


def test_doubling_alpha_doubles_the_change_of_every_adapted_matrix():
    params = tiny_params(CONFIG)

    def merged(alpha: float):
        fresh = represent(params, [Rule(ALL_MATRICES, Adapt(3, alpha))], jax.random.key(1))
        return fresh, jax.tree.leaves(merge_lora(map_leaves(lambda w: w.replace(b=w.b + 0.5), fresh, ALL_MATRICES)))

    flat, _ = jax.tree_util.tree_flatten_with_path(merged(5.0)[0], is_leaf=is_leaf)
    found = {path_name(path) for path, leaf in flat if isinstance(leaf, LoRA)}
    expected = {f"decoder.layers.{m}" for m in ("q", "k", "v", "o", "gate", "up", "down")} | {"projector.fc1", "projector.fc2"}
    assert found == expected | {f"vision.layers.{m}" for m in ("qkv", "proj", "fc1", "fc2", "fc3")}
    changed = 0
    for base, one, two in zip(jax.tree.leaves(params), merged(5.0)[1], merged(10.0)[1], strict=True):
        change = np.asarray(one, np.float64) - np.asarray(base)
        # base + delta is rounded to float32, half an ulp of it each time: 1e-6 of the largest entry has slack
        np.testing.assert_allclose(np.asarray(two, np.float64) - np.asarray(base), 2 * change, atol=1e-6 * np.abs(two).max())
        changed += bool(np.abs(change).max() > 1e-2)
    assert changed == len(found)


def test_merged_equals_unmerged():
    separate = adapted(tiny_params(CONFIG), 4)
    merged = merge_lora(separate)
    assert not any(is_leaf(w) for w in jax.tree.leaves(merged, is_leaf=is_leaf))
    assert max_relative(scores(merged), scores(separate)) <= TOLERANCE


def test_a_stack_of_adapters_cannot_be_merged():
    stacked = stack_adapters([adapted(tiny_params(CONFIG), 1)] * 2, jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="no single dense weight"):
        merge_lora(stacked)


def test_a_pattern_that_matches_nothing_is_refused_and_one_that_matches_touches_nothing_else():
    params = tiny_params(CONFIG)
    with pytest.raises(ValueError, match="matches none"):
        map_leaves(lambda w: w, params, r"decoder\.layers\.query")
    changed = map_leaves(lambda w: np.asarray(w) + 1, params, r"decoder\.layers\.(q|gate)")
    flat, _ = jax.tree_util.tree_flatten_with_path(changed)
    pairs = zip(flat, jax.tree.leaves(params), strict=True)
    hit = {path_name(path) for (path, leaf), before in pairs if not np.array_equal(leaf, before)}
    assert hit == {"decoder.layers.q", "decoder.layers.gate"}
