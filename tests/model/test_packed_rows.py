"""Conversations that share a row do not see each other: packed equals alone, in values and in gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import max_relative, random_sample, tiny_batch, tiny_config, tiny_params, worst_leaf

from andesvl_jax.inputs.packing import Budget, assemble
from andesvl_jax.model import attention
from andesvl_jax.model.andesvl import forward
from andesvl_jax.model.splash import splash
from andesvl_jax.training.objectives import cross_entropy

NETWORKS = {
    "aimv2": tiny_config("aimv2"),
    "siglip2": tiny_config("siglip2"),
    "windowed aimv2": tiny_config("aimv2", vision={"full_attention_layers": (1,)}),
}
BACKENDS = {"einsum": ("einsum", 256), "chunked": ("chunked", 7), "splash": ("splash", 256)}  # 7 divides no length used here
# the kernel's interpreter compiles slowly; one network has every kind of segments
CASES = [
    pytest.param(n, b, marks=pytest.mark.slow) if b == "splash" and n != "windowed aimv2" else (n, b)
    for n in NETWORKS
    for b in BACKENDS
]
# float32 sums in another order; a leak between samples or images changes hidden states by 1e-2 and more
TOLERANCE = 2e-5


@functools.partial(jax.jit, static_argnames="config")
def hidden_and_gradient(params, config, batch):
    def loss(params):
        hidden = forward(params, config, batch)
        return cross_entropy(params, hidden, batch.target_slots, batch.targets, batch.target_weights, chunk=10)[0], hidden

    (_, hidden), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return hidden, gradient


def conversations(config):
    rng = np.random.default_rng(3)
    grids = [((2, 4), (6, 2)), (), ((4, 6),), ((8, 4),), ((2, 2), (4, 4), (2, 6))]
    return [random_sample(config, rng, g, text=9 + i) for i, g in enumerate(grids)]


@functools.cache
def alone(network: str):
    """Hidden states of each conversation by itself, and the sum of their gradients, with the plain backend."""
    config = NETWORKS[network]
    params = tiny_params(config)
    runs = [hidden_and_gradient(params, config, tiny_batch(config, [[s], []])) for s in conversations(config)]
    return [h[0, : len(s.tokens)] for (h, _), s in zip(runs, conversations(config), strict=True)], jax.tree.map(
        lambda *g: sum(g), *(g for _, g in runs)
    )


@pytest.mark.parametrize(("network", "backend"), CASES)
def test_packed_conversations_equal_each_alone_in_any_order(network, backend, monkeypatch):
    name, chunk = BACKENDS[backend]
    config = NETWORKS[network].replace(attention=name, attention_chunk=chunk)
    params, samples = tiny_params(config), conversations(config)
    expected, expected_gradient = alone(network)
    if backend == "splash":
        monkeypatch.setattr(attention, "target_platform", lambda: "tpu")
        monkeypatch.setattr(attention, "splash", functools.partial(splash, interpret=True))
    for rows in ([[0, 1, 2], [3, 4]], [[2, 0, 1], [4, 3]]):
        hidden, gradient = hidden_and_gradient(params, config, tiny_batch(config, [[samples[i] for i in row] for row in rows]))
        for r, row in enumerate(rows):
            start = 0
            for i in row:
                stop = start + len(samples[i].tokens)
                assert max_relative(hidden[r, start:stop], expected[i]) <= TOLERANCE, (rows, i)
                start = stop
        worst, where = worst_leaf(gradient, expected_gradient)
        assert worst <= TOLERANCE, (rows, where)


def test_padding_changes_nothing():
    config = NETWORKS["windowed aimv2"]
    sample = conversations(config)[0]
    exact = Budget(1, len(sample.tokens), sample.patches, sample.targets)
    batch = assemble([[sample]], exact, config.vision.patch_features)
    assert all((np.asarray(x) >= 0).all() for x in (batch.positions, batch.segments, batch.target_slots, batch.images.segments))
    hidden = jax.jit(forward, static_argnums=1)(tiny_params(config), config, batch)
    assert max_relative(hidden[0], alone("windowed aimv2")[0][0]) <= TOLERANCE


def test_a_conversation_does_depend_on_its_own_images_and_tokens():
    """The other side of the tests above: what must be seen is seen."""
    config = NETWORKS["aimv2"]
    params, sample = tiny_params(config), conversations(config)[0]
    batch = tiny_batch(config, [[sample]])
    hidden = jax.jit(forward, static_argnums=1)
    before = np.asarray(hidden(params, config, batch))
    brighter = batch.replace(images=batch.images.replace(patches=batch.images.patches.copy()))
    brighter.images.patches[0, sample.patches - 1] += 1  # last patch of the second picture
    after = np.asarray(hidden(params, config, brighter))
    first = np.flatnonzero(sample.tokens == config.image_token_id)[2]  # first token of the second picture
    np.testing.assert_array_equal(after[0, :first], before[0, :first])
    assert np.all(np.abs(after[0, first : len(sample.tokens)] - before[0, first : len(sample.tokens)]).max(-1) > 1e-4)


def test_remat_choices_change_neither_values_nor_gradients():
    config = NETWORKS["siglip2"]
    params, batch = tiny_params(config), tiny_batch(config, [conversations(config)[:2]])
    runs = [hidden_and_gradient(params, config.replace(remat=remat), batch) for remat in ("none", "layer", "dots")]
    for run in runs[1:]:
        worst, where = worst_leaf(run, runs[0])
        assert worst <= TOLERANCE, where  # recomputation may fuse differently, so equal up to float32 rounding


def test_bfloat16_compute_stays_close_to_float32():
    config = NETWORKS["aimv2"]
    params, batch = tiny_params(config), tiny_batch(config, [conversations(config)[:2]])
    run = jax.jit(forward, static_argnums=1)
    low, high = run(params, config.replace(dtype="bfloat16"), batch), run(params, config, batch)
    assert low.dtype == jnp.bfloat16
    present = np.asarray(batch.positions) >= 0
    difference = np.asarray(low, np.float32)[present] - np.asarray(high)[present]
    # 8 bits of mantissa through 4 layers: the golden sets show 1 to 3 % relative RMS
    assert 1e-4 < np.sqrt(np.mean(difference**2) / np.mean(np.asarray(high)[present] ** 2)) < 0.04
