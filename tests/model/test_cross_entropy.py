"""The chunked loss: equal to the plain one, and never holding logits of the whole batch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config, tiny_params, worst_leaf

from andesvl_jax.model.andesvl import describe
from andesvl_jax.model.decoder import logits
from andesvl_jax.training.objectives import cross_entropy
from andesvl_jax.weights import Int8, abstract, dense, pack


def plain(params, hidden, slots, targets, weights):
    """Log-softmax of every slot's logits, weighted and summed over the supervised ones."""
    scores = jax.nn.log_softmax(hidden @ params.decoder.embedding.T, axis=-1)
    total = jnp.zeros(())
    for row, slot in np.argwhere(np.asarray(slots) >= 0):
        total -= weights[row, slot] * scores[row, slots[row, slot], targets[row, slot]]
    return total


def problem(config):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 20, config.text.hidden_size)), jnp.float32)
    slots = np.full((2, 9), -1, np.int32)
    slots[0, :7], slots[1, :4] = rng.choice(20, 7, replace=False), rng.choice(20, 4, replace=False)
    weights = np.where(slots >= 0, rng.random((2, 9)), 0).astype(np.float32)
    return hidden, slots, rng.integers(0, config.text.vocab_size, (2, 9)).astype(np.int32), weights


@pytest.mark.parametrize("chunk", [1, 5, 18, 1024])
def test_the_chunked_loss_and_its_gradients_equal_the_plain_ones(chunk):
    config = tiny_config()
    params, (hidden, slots, targets, weights) = tiny_params(config), problem(config)
    expected = jax.jit(jax.value_and_grad(lambda p, h: plain(p, h, slots, targets, weights), argnums=(0, 1)))(params, hidden)
    run = jax.jit(jax.value_and_grad(lambda p, h: cross_entropy(p, h, slots, targets, weights, chunk)[0], argnums=(0, 1)))
    worst, where = worst_leaf(run(params, hidden), expected)
    assert worst <= 2e-5, where  # the same float32 terms, summed chunk by chunk
    assert float(cross_entropy(params, hidden, slots, targets, weights, chunk)[1]) == pytest.approx(weights.sum(), rel=1e-6)


def largest_array(jaxpr) -> int:
    """Elements of the largest value that any equation produces, inner programs included."""
    is_program = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")  # noqa: E731
    values = [p for eqn in jaxpr.eqns for p in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program)]
    programs = [getattr(p, "jaxpr", p) for p in values if is_program(p)]
    sizes = [math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars]
    return max([*sizes, *map(largest_array, programs)], default=0)


def test_logits_of_a_whole_batch_never_exist_at_the_released_vocabulary():
    """By abstract evaluation of loss and gradient alone: 2 x 4096 slots of V = 151,936 would be 5 GB of float32."""
    config = tiny_config(text={"vocab_size": 151_936})
    params = abstract(describe(config), jnp.float32)
    hidden = jax.ShapeDtypeStruct((2, 4096, config.text.hidden_size), jnp.float32)
    slots, weights = (jax.ShapeDtypeStruct((2, 4096), dtype) for dtype in (jnp.int32, jnp.float32))

    def jaxpr(loss):
        return jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, hidden, slots, slots, weights).jaxpr

    assert largest_array(jaxpr(lambda p, h, s, t, w: cross_entropy(p, h, s, t, w, chunk=512)[0])) == 512 * 151_936
    # the measure does see them where they exist
    assert largest_array(jaxpr(lambda p, h, s, t, w: logits(p.decoder, h).sum())) == 2 * 4096 * 151_936


def products(jaxpr) -> int:
    """Matrix products in a program, those of inner programs included."""
    programs = [p for eqn in jaxpr.eqns for p in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))]
    inner = [getattr(p, "jaxpr", p) for p in programs if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
    return sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns) + sum(map(products, inner))


def test_a_step_makes_logits_once():
    """Three products: the logits, and the gradients of both that they are made of; none of a frozen table in the program."""
    config = tiny_config()
    params, (hidden, *rest) = tiny_params(config), problem(config)
    loss = lambda p, h: cross_entropy(p, h, *rest, chunk=5)[0]  # noqa: E731
    assert products(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, hidden).jaxpr) == 3
    assert products(jax.make_jaxpr(loss)(params, hidden).jaxpr) == 1
    frozen = jax.jit(jax.grad(lambda h: loss(jax.lax.stop_gradient(params), h))).lower(hidden).compile().as_text()
    assert frozen.count(" dot(") + frozen.count("__onednn$matmul") <= 2


def test_a_table_of_whole_numbers_and_weights_that_are_learned():
    """Codes have no gradient and stop none; a weight's gradient is its token's own loss."""
    config = tiny_config()
    params, (hidden, slots, targets, weights) = tiny_params(config), problem(config)
    table = pack(params.decoder.embedding, Int8())
    packed = params.replace(decoder=params.decoder.replace(embedding=table))
    loss = lambda p, h, w: cross_entropy(p, h, slots, targets, w, chunk=5)[0]  # noqa: E731
    same = params.replace(decoder=params.decoder.replace(embedding=dense(table)))
    for argument in (1, 2):
        found, expected = (jax.grad(loss, argnums=argument)(p, hidden, jnp.asarray(weights)) for p in (packed, same))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)  # float32, scaled before or after the product
    tokens = jnp.where(slots >= 0, jax.grad(loss, argnums=2)(params, hidden, jnp.asarray(weights)), 0)
    assert float((tokens * weights).sum()) == pytest.approx(float(loss(params, hidden, weights)), rel=1e-5)
