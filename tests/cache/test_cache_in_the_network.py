"""The cache as the network uses it: slots without order, eviction that keeps everything, one program per bucket."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import max_relative, random_sample, tiny_batch, tiny_config, tiny_params

from andesvl_jax.cache.eviction import POLICIES, Eviction
from andesvl_jax.cache.kv import cache_bytes
from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.decoding.sampling import sampling_options
from andesvl_jax.decoding.session import Session
from andesvl_jax.decoding.state import decode_until, evict, prefill
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.packing import assemble_prompts
from andesvl_jax.model.attention import Place
from andesvl_jax.model.decoder import decode, embed_tokens, logits

CONFIG = tiny_config()


@functools.cache
def params():
    return tiny_params(CONFIG)


@functools.cache
def bundle() -> Bundle:
    return Bundle(CONFIG, params(), None, ImageProcessor(patch_size=2))


def prompts(*lengths: int):
    rng = np.random.default_rng(5)
    samples = [random_sample(CONFIG, rng, (), text=n) for n in lengths]
    return [dataclasses.replace(s, supervised=np.zeros_like(s.supervised)) for s in samples]


def prefilled(samples, eviction: Eviction | None):
    batch = assemble_prompts(samples, CONFIG.vision.patch_features)
    observe = 0 if eviction is None else eviction.window
    state = prefill(params(), CONFIG, batch.tokens, batch.positions, None, batch.visual_index, observe)
    if eviction is not None:
        state = evict(params(), CONFIG, state, eviction)
    return state.last, state.cache


def generated(samples, eviction: Eviction | None, new_tokens: int = 12):
    session = Session(bundle(), observe=0 if eviction is None else eviction.window)
    session.extend(samples)
    if eviction is not None:
        session.evict(eviction)
    *_, ids = session.generate(sampling_options(len(samples)), new_tokens)
    return ids, np.asarray(session.state.last), session.kv_slots


@jax.jit
def next_logits(cache, tokens):
    x = embed_tokens(params().decoder, CONFIG, tokens[:, None])
    decoded = decode(params().decoder, CONFIG, x, Place(cache.length[:, None]), cache)
    return logits(params().decoder, decoded.hidden[:, 0])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_whole_budget_evicts_nothing(policy):
    samples = prompts(50, 23)
    ids, last, slots = generated(samples, None)
    kept_ids, kept_last, kept_slots = generated(samples, Eviction(policy, 1.0))
    assert slots == kept_slots
    np.testing.assert_array_equal(ids, kept_ids)
    assert max_relative(kept_last, last) <= 1e-6  # the same numbers in the same order, in a program compiled apart


def test_the_order_of_slots_does_not_matter():
    samples = prompts(50, 23)
    last, cache = prefilled(samples, Eviction("okv", 0.5))
    tokens = jnp.argmax(last, -1)
    order = np.argsort(np.random.default_rng(0).random(cache.positions.shape), axis=-1)  # another one in each layer, row, head

    def shuffle(x):
        return jnp.asarray(np.take_along_axis(np.asarray(x), order.reshape(*order.shape, *[1] * (x.ndim - 4)), 3))

    shuffled = cache.replace(keys=shuffle(cache.keys), values=shuffle(cache.values), positions=shuffle(cache.positions))
    assert not np.array_equal(shuffled.positions, cache.positions)
    # float32 sums over slots in another order
    assert max_relative(next_logits(shuffled, tokens), next_logits(cache, tokens)) <= 1e-5


def test_an_evicted_slot_is_not_seen():
    """Emptying a slot by its position alone equals making its content anything else."""
    _, cache = prefilled(prompts(50, 23), None)
    tokens = jnp.array([3, 4])
    hidden = cache.positions.at[:, :, 1, 5:9].set(-1)
    keys, values = cache.keys.at[:, :, 1, 5:9].set(7.0), cache.values.at[:, :, 1, 5:9].set(-9.0)
    noise = cache.replace(keys=keys, values=values, positions=hidden)
    np.testing.assert_array_equal(next_logits(noise, tokens), next_logits(cache.replace(positions=hidden), tokens))
    assert max_relative(next_logits(noise, tokens), next_logits(cache, tokens)) > 1e-3


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_of_unequal_length_equal_each_row_alone(policy):
    eviction, samples = Eviction(policy, 0.4), prompts(70, 20)  # alone the second one runs in a smaller bucket
    last, cache = prefilled(samples, eviction)
    together = np.asarray(cache.positions)
    tokens = jnp.argmax(last, -1)
    after = next_logits(cache, tokens)
    for row, sample in enumerate(samples):
        alone_last, alone = prefilled([sample], eviction)
        for layer, head in np.ndindex(together.shape[0], together.shape[2]):
            kept = [np.asarray(x) for x in (together[layer, row, head], alone.positions[layer, 0, head])]
            np.testing.assert_array_equal(*[x[x >= 0] for x in kept])
        assert max_relative(last[row], alone_last[0]) <= 2e-5  # float32 in another bucket, hence another program
        assert max_relative(after[row], next_logits(alone, tokens[row : row + 1])[0]) <= 2e-5


def test_eviction_frees_what_it_promises():
    full, evicted = (prefilled(prompts(64, 64), e)[1] for e in (None, Eviction("okv", 0.25)))
    assert evicted.slots == 20  # 1.25 x 16, for heads that keep more than the average
    assert cache_bytes(evicted) / cache_bytes(full) == 20 / 64


def test_prompts_of_one_bucket_share_one_program():
    before = prefill._cache_size(), decode_until._cache_size()
    eviction = Eviction("okv", 0.375)
    for length in (9, 33, 64):
        generated(prompts(length), eviction, new_tokens=length % 5 + 2)
    assert (prefill._cache_size() - before[0], decode_until._cache_size() - before[1]) == (1, 1)


def test_segments_in_a_cached_row_are_refused():
    _, cache = prefilled(prompts(50, 23), None)
    batch = tiny_batch(CONFIG, [prompts(9), prompts(8)])
    x = embed_tokens(params().decoder, CONFIG, batch.tokens)
    with pytest.raises(ValueError, match="one conversation per row"):
        decode(params().decoder, CONFIG, x, Place(batch.positions, batch.segments), cache)
