"""The explicit count of FLOPs against the products that the network really makes, XLA's estimate, and a count by hand."""

import itertools
import math

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from tiny import FAMILIES, random_sample, tiny_batch, tiny_config

from andesvl_jax.config import CONFIGS
from andesvl_jax.model.andesvl import AndesVL, describe, forward, unstack_layers
from andesvl_jax.model.decoder import logits
from andesvl_jax.model.flops import PARTS, batch_flops, forward_flops, step_flops
from andesvl_jax.weights import abstract, count

ROWS, TOKENS, PATCHES, OUTPUTS = 2, 40, 64, 12
TRAINED = [parts for n in (1, 2, 3) for parts in itertools.combinations(PARTS, n)]


def unrolled(config):
    """A loss on the logits of the first OUTPUTS tokens of full rows, and abstract arguments."""
    rng = np.random.default_rng(0)
    batch = tiny_batch(
        config, [[random_sample(config, rng, ((8, 8),), text=TOKENS - 16)] for _ in range(ROWS)], TOKENS, PATCHES, TOKENS
    )

    def loss(trained: dict, frozen: dict):
        params, unrolled = unstack_layers(AndesVL(**trained, **frozen), config)
        return logits(params.decoder, forward(params, unrolled, batch)[:, :OUTPUTS]).sum()

    params = abstract(describe(config), config.param_dtype)
    return loss, {part: getattr(params, part) for part in PARTS}


def products(jaxpr) -> int:
    """2 x multiply-adds of every dot_general of a traced function, at any depth."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        total += sum(products(sub) for sub in jaxprs_in_params(eqn.params))
    return total


def above_the_diagonal(config, times: int) -> int:
    """What an einsum multiplies of causal attention only to mask it."""
    text = config.text
    return times * 4 * text.num_layers * text.num_heads * text.head_dim * ROWS * TOKENS * (TOKENS - 1) // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_every_step_count_the_products_that_are_made(family):
    """Exact. Without a position table, whose taps are no products that are needed."""
    config = tiny_config(family, vision={"table_side": None}, attention="einsum")
    loss, params = unrolled(config)
    made = products(jax.make_jaxpr(loss)(params, {}).jaxpr)
    assert sum(forward_flops(config, ROWS, TOKENS, PATCHES, OUTPUTS).values()) == made - above_the_diagonal(config, 1)
    for trained in TRAINED:
        split = {p: params[p] for p in trained}, {p: params[p] for p in PARTS if p not in trained}
        made = products(jax.make_jaxpr(jax.value_and_grad(loss))(*split).jaxpr)
        assert step_flops(config, ROWS, TOKENS, PATCHES, OUTPUTS, trained) == made - above_the_diagonal(config, 3), trained


def test_xla_estimates_the_same_for_an_unrolled_einsum_program():
    """Within 5 %: XLA adds what is no product (norms, softmax, activations), about 2 % at these widths."""
    wide = {"hidden_size": 128, "intermediate_size": 320}
    config = tiny_config(vision=wide | {"table_side": None}, text=wide | {"head_dim": 64}, attention="einsum")
    loss, params = unrolled(config)
    for function, ours in (
        (loss, sum(forward_flops(config, ROWS, TOKENS, PATCHES, OUTPUTS).values()) + above_the_diagonal(config, 1)),
        (jax.grad(loss), step_flops(config, ROWS, TOKENS, PATCHES, OUTPUTS, PARTS) + above_the_diagonal(config, 3)),
    ):
        theirs = jax.jit(function).lower(params, {}).compile().cost_analysis()["flops"]
        assert 1.0 <= theirs / ours < 1.05


def test_the_4b_decoder_by_hand():
    """36 layers; q 2560 x 4096, k and v 2560 x 1024, o 4096 x 2560, mlp 3 x 2560 x 9728; 32 heads of width 128, not 2560 / 32."""
    tokens, outputs = 4096, 1000
    layer = 2 * 2560 * (4096 + 2 * 1024 + 4096 + 3 * 9728)
    seen = 2 * 2 * 32 * 128 * (4096 * 4097 // 2)  # scores and values over the keys up to the query
    expected = 36 * (tokens * layer + seen) + 2 * 151936 * 2560 * outputs
    assert forward_flops(CONFIGS["andesvl-4b"], 1, tokens, 0, outputs) == {"vision": 0, "projector": 0, "decoder": expected}


def test_a_packed_batch_costs_the_sum_of_its_samples_whatever_the_padding():
    """Each sample is a full row of its own."""
    config, rng = tiny_config(), np.random.default_rng(0)
    samples = [random_sample(config, rng, (grid,), text=5 + i) for i, grid in enumerate([(2, 4), (6, 4), (2, 2), (4, 2)])]
    packed = tiny_batch(config, [samples[:3], samples[3:], []])
    for trained in TRAINED:
        alone = [step_flops(config, 1, len(s.tokens), s.patches, s.targets, trained) for s in samples]
        assert batch_flops(config, packed, trained) == sum(alone)


def test_pictures_are_counted_window_by_window_where_layers_see_windows():
    """Of 8 x 6 patches, windows of 4 x 4 leave two of 4 x 4 and two of 4 x 2."""
    whole, cut = tiny_config(), tiny_config(vision={"full_attention_layers": (1,), "window_size": 8})
    batch = tiny_batch(whole, [[random_sample(whole, np.random.default_rng(0), ((8, 6),))]])
    fewer = 48**2 - 2 * 16**2 - 2 * 8**2  # pairs in the one layer of two that sees windows
    saved = batch_flops(whole, batch, PARTS) - batch_flops(cut, batch, PARTS)
    assert saved == 3 * 4 * whole.vision.hidden_size * fewer


def test_parameters_and_tokens_give_the_usual_estimate():
    """6 x parameters x tokens for text alone, without logits; attention over 64 tokens adds less than one percent."""
    config = CONFIGS["andesvl-1b"]
    layers = count(describe(config).decoder.layers)
    short = step_flops(config, 1, 64, 0, 0, ("decoder",))
    assert short == pytest.approx(6 * layers * 64, rel=0.01)
