"""Decoding with a cache against recomputing everything, batches against single prompts, and the bookkeeping around both."""

import functools

import numpy as np
import pytest
from tiny import IMAGE_TOKEN, tiny_config, tiny_params

import andesvl_jax as avl
from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.decoding.api import prompt_sample, stream
from andesvl_jax.decoding.sampling import sampling_options
from andesvl_jax.decoding.session import Session
from andesvl_jax.inputs.image import ImageProcessor

CONFIG = tiny_config(vision={"full_attention_layers": (1,)}, text={"tie_word_embeddings": False})


@functools.cache
def bundle() -> Bundle:
    processor = ImageProcessor(patch_size=2, max_size=24)
    return Bundle(CONFIG, tiny_params(CONFIG, seed=2), None, processor, {"eos_token_id": [63, 62]})


def prompt(seed: int, sizes: tuple[tuple[int, int], ...], text: int):
    """Ids with image slots, and the pictures (width x height pixels) that fill them."""
    rng = np.random.default_rng(seed)
    pictures = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in sizes]
    ids = list(rng.integers(0, IMAGE_TOKEN, text))
    for w, h in sizes:
        ids[2:2] = [IMAGE_TOKEN] * bundle().image_processor.visual_tokens(w, h)
    return np.array(ids), pictures


PROMPTS = ((0, ((10, 7), (9, 9)), 12), (1, (), 31), (2, ((5, 13),), 20))


def greedy(n: int = 12, **options):
    return avl.generate(bundle(), *prompt(*PROMPTS[0]), max_new_tokens=n, stop_ids=(), **options)


def test_greedy_decoding_equals_recomputing_every_step():
    ids, pictures = prompt(*PROMPTS[0])
    assert IMAGE_TOKEN not in greedy()  # a generated placeholder is no picture, a prompt's one is
    for token in greedy():
        assert avl.probe(bundle(), ids, pictures)["logits"][-1].argmax() == token
        ids = np.append(ids, token)
    assert len(set(greedy().tolist())) > 3  # a constant answer would prove little


def test_a_batch_equals_each_prompt_alone_greedy_and_sampled():
    """Rows differ in length, in their number of pictures, in temperature and in seed."""
    samples = [prompt_sample(bundle(), *prompt(*p)) for p in PROMPTS]
    temperatures, seeds = (0.0, 0.9, 1.4), (11, 5, 7)
    *_, together = stream(bundle(), samples, 12, temperatures, (), seed=list(seeds), top_k=20, top_p=0.95)
    for row, p in enumerate(PROMPTS):
        options = {"temperature": temperatures[row], "seed": seeds[row], "top_k": 20, "top_p": 0.95}
        alone = avl.generate(bundle(), *prompt(*p), max_new_tokens=12, stop_ids=(), **options)
        np.testing.assert_array_equal(together.ids[row], alone)
    np.testing.assert_array_equal(together.ids[0], greedy())


def test_a_row_stops_at_its_stop_id_and_leaves_the_others_alone():
    samples = [prompt_sample(bundle(), *prompt(*p)) for p in PROMPTS]
    *_, free = stream(bundle(), samples, 12, stop_ids=())
    stop = int(free.ids[1][4])
    *_, stopped = stream(bundle(), samples, 12, stop_ids=(stop, 61))
    for whole, cut in zip(free.ids, stopped.ids, strict=True):
        ends = [i + 1 for i, token in enumerate(whole) if token in (stop, 61)]
        np.testing.assert_array_equal(cut, whole[: min(ends, default=12)])
    assert len(stopped.ids[1]) <= 5 and stopped.ids[1][-1] in (stop, 61)
    assert bundle().stop_ids == (63, 62)


def test_top_k_of_one_is_greedy():
    np.testing.assert_array_equal(greedy(temperature=1.3, top_k=1, seed=9), greedy())


def test_a_seed_repeats_itself_and_another_differs():
    draws = [greedy(temperature=2.0, seed=seed).tolist() for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


def test_streaming_gives_the_tokens_of_one_run():
    sample = prompt_sample(bundle(), *prompt(*PROMPTS[0]))
    answers = [a.ids[0] for a in stream(bundle(), [sample], 11, stop_ids=(), chunk=3)]
    assert [len(a) for a in answers] == [3, 6, 9, 11]
    for answer in answers:
        np.testing.assert_array_equal(answer, greedy()[: len(answer)])


def test_a_decoding_step_gives_its_buffers_to_the_next():
    sample = prompt_sample(bundle(), *prompt(*PROMPTS[0]))
    session = Session(bundle())
    session.extend([sample])
    answers = session.generate(sampling_options(1), 11, chunk=3)
    next(answers)
    state = session.state
    old = state.cache.keys, state.cache.values, state.cache.positions, state.tokens, state.last
    assert len(next(answers)[0]) == 6
    assert all(buffer.is_deleted() for buffer in old)
    assert not session.state.cache.keys.is_deleted()


def test_repetition_penalty_and_presence_penalty_act():
    plain, punished = greedy(), greedy(presence_penalty=50.0)
    assert len(set(punished.tolist())) == 12 > len(set(plain.tolist()))
    seen = set(prompt(*PROMPTS[0])[0].tolist())
    fresh = greedy(repetition_penalty=1e6)
    assert len(set(fresh.tolist())) == 12 and not set(fresh.tolist()) & seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_q": 1}, "'top_q' is unknown"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"max_new_tokens": 254}, "max_position_embeddings"),
        ({"kv_policy": "h2o"}, "kv_policy is 'h2o'"),
        ({"kv_policy": "okv", "kv_budget": 2.0}, "kv_budget is 2.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"seed": 2**40}, "seed is 1099511627776"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(avl.UserError, match=message):
        avl.generate(bundle(), [1, 2, 3], **options)


@pytest.mark.parametrize(
    ("ids", "pictures", "message"),
    [
        ([], 0, "at least one id"),
        ([[1, 2]], 0, "in one row"),
        ([1, 64], 0, "from 0 to 63"),
        ([1, -1], 0, "from 0 to 63"),
        ([1, 2.5], 0, "whole numbers"),
        ([1, IMAGE_TOKEN], 0, "1 image slots"),
        ([1, 2], 1, "0 image slots"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(ids, pictures, message):
    with pytest.raises(avl.UserError, match=message):
        avl.generate(bundle(), ids, [np.zeros((8, 8, 3), np.uint8)] * pictures)
