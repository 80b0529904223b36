"""Recipes map parameters and descriptions alike, and what follows from a description holds for packed and adapted weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import max_relative, tiny_config, tiny_params

from andesvl_jax.errors import UserError
from andesvl_jax.model.andesvl import describe
from andesvl_jax.weights import (
    ALL_MATRICES,
    DECODER_MATRICES,
    Adapt,
    Int4,
    Int8,
    LoRA,
    Packed,
    Quantize,
    Recipe,
    Rule,
    Simulate,
    Ternary,
    abstract,
    apply,
    dense,
    initialize,
    is_leaf,
    is_param,
    output_range,
    pack,
    represent,
    requantize,
)
from andesvl_jax.weights.leaf import leaf_kind

CONFIG = tiny_config(text={"tie_word_embeddings": False})
TABLES = r"decoder\.(embedding|head)"
RECIPES = {
    "int8": [Rule(ALL_MATRICES, Quantize(Int8())), Rule(TABLES, Quantize(Int8(), axis=-1))],
    "int4 groups": [Rule(DECODER_MATRICES, Quantize(Int4(8)))],
    "ternary": [Rule(ALL_MATRICES, Quantize(Ternary())), Rule(TABLES, Quantize(Ternary(8), axis=-1))],
    "simulated": [Rule(ALL_MATRICES, Simulate(Int4(8)))],
    "adapted": [Rule(ALL_MATRICES, Adapt(3, 6.0))],
    "adapted over packed": [
        Rule(DECODER_MATRICES, Quantize(Int4())),
        Rule(r"decoder\.layers\.(q|v)", Adapt(2, 4.0, rank_stabilized=True)),
    ],
}


@pytest.mark.parametrize("rules", RECIPES.values(), ids=RECIPES)
def test_a_description_has_the_shapes_and_dtypes_of_the_parameters(rules):
    recipe = Recipe(tuple(rules))
    params = represent(tiny_params(CONFIG), recipe, jax.random.key(0))
    description = describe(CONFIG, recipe)
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert jax.tree.leaves(abstract(description, CONFIG.param_dtype)) == jax.tree.leaves(expected)
    assert jax.tree.structure(description, is_leaf=is_param) == jax.tree.structure(params)
    for param in jax.tree.leaves(description, is_leaf=is_param):
        assert len(param.axes) == len(param.shape)


def test_a_fresh_adapter_is_initialized_from_its_description():
    description = describe(CONFIG, Recipe((Rule(r"decoder\.layers\.q", Adapt(2, 4.0, rank_stabilized=True)),)))
    leaf = initialize(description, jax.random.key(0), "float32").decoder.layers.q
    np.testing.assert_array_equal(leaf.b, 0.0)
    np.testing.assert_allclose(leaf.scale, 4.0 / 2**0.5)
    assert 0.5 < float(jnp.std(leaf.a)) * CONFIG.text.hidden_size**0.5 < 1.5


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule(r"decoder\.layers\.query", Quantize(Int8()))], "matches none of the"),
        ([Rule(DECODER_MATRICES, Quantize(Int8())), Rule(r"decoder\.layers\.q", Quantize(Int4()))], "layers.q is matched by"),
        ([Rule(DECODER_MATRICES, Adapt(2, 1.0)), Rule(r"decoder\.layers\.q", Quantize(Int4()))], "layers.q is matched by"),
        ([Rule(DECODER_MATRICES, Adapt(2, 1.0))] * 2, "is matched by"),
        ([Rule(r"decoder\.layers\.q_norm", Quantize(Int8()))], "not a norm or a bias"),
        ([Rule(r"decoder\.norm", Adapt(2, 1.0))], "not a norm or a bias"),
        (
            [Rule(DECODER_MATRICES, Quantize(Int4(7)))],
            r"layers\.\w+: scheme int4: an axis of \d+ weights cannot be cut into groups of 7",
        ),
    ],
)
def test_recipes_that_do_not_fit_are_refused_for_arrays_and_descriptions(rules, message):
    for tree in (tiny_params(CONFIG), describe(CONFIG)):
        with pytest.raises(UserError, match=message):
            represent(tree, rules, jax.random.key(0))


@pytest.mark.parametrize("rank", [0, -1, 2.5, True])
def test_a_rank_that_is_no_positive_whole_number_is_refused(rank):
    with pytest.raises(UserError, match="adapter rank"):
        Adapt(rank, 1.0)


@leaf_kind
class Halved(Packed):
    """A packed leaf whose output is rounded to halves: the least that an output quantizer does."""


@apply.register(Halved)
def _(w, x, bias=None):
    return requantize(w, apply(Packed(w.arrays, w.scheme, w.shape, w.axis), x, bias))


@output_range.register(Halved)
def _(w):
    return 0.5


@requantize.register(Halved)
def _(w, y):
    return jnp.round(y * 2) / 2


def test_an_adapter_adds_in_the_output_range_of_its_base():
    rng = np.random.default_rng(0)
    w, x, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 6), (3, 8), (6,)))
    base = pack(w, Int8())
    halved = Halved(base.arrays, base.scheme, base.shape, base.axis)
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 2), (2, 6)))
    adapted = LoRA(halved, a, b, jnp.float32(2.0))
    half = lambda y: np.round(np.asarray(y, np.float64) * 2) / 2  # noqa: E731
    rounded_base = half(x @ dense(base) + bias)  # the bias is inside what is rounded
    np.testing.assert_allclose(apply(adapted, x, bias), half(rounded_base + half(2.0 * (x @ a) @ b)), atol=1e-6)
    assert output_range(adapted) == 0.5 and output_range(LoRA(base, a, b, jnp.float32(1.0))) is None


@pytest.mark.parametrize("scheme", [Int8(), Int4(32), Ternary()], ids=str)
def test_a_packed_leaf_is_decoded_one_layer_at_a_time(scheme):
    """In a scan, and in a loop around it, where XLA would lift the decoding of all layers out of the loop."""
    layers, width = 8, 128
    stack = pack(jax.random.normal(jax.random.key(0), (layers, width, width)) / width**0.5, scheme)

    def scanned(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(apply(w, x)), None), x, w)[0]

    def looped(w, x):
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, scanned(w, c[1])), (0, x))[1]

    x = jnp.ones((4, width))
    for fn, rounds in ((scanned, 1), (looped, 3)):
        compiled = jax.jit(fn).lower(stack, x).compile()
        # float32 of one layer, its codes on the way (int32 of ternary digits), and activations
        assert compiled.memory_analysis().temp_size_in_bytes <= 3 * 4 * width * width, fn
        expected = x
        for w in [*dense(stack)] * rounds:
            expected = jnp.tanh(expected @ w)
        assert max_relative(compiled(stack, x), expected) <= 1e-5  # float32 sums through 24 layers


def test_every_leaf_of_a_recipe_is_a_leaf_of_the_tree():
    params = represent(tiny_params(CONFIG), RECIPES["adapted over packed"], jax.random.key(0))
    leaves = jax.tree.leaves(params, is_leaf=is_leaf)
    adapted = [w for w in leaves if isinstance(w, LoRA)]
    assert len(adapted) == 2 and all(isinstance(w.base, Packed) for w in adapted)
