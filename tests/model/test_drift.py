"""The goldens bite: every wrong variant in tests/mutations.py fails the sets that are named with it; the right one passes."""

import functools
import importlib

import jax
import numpy as np
import pytest
from golden_sets import ODD, STORED, deviations, golden_set
from mutations import MUTATIONS
from reference import activations
from tiny import random_sample, tiny_params

import andesvl_jax as avl
from andesvl_jax.checkpoints.hf import params_to_hf
from andesvl_jax.decoding import state as state_lib
from andesvl_jax.inputs import chat, packing
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.model import andesvl

probe_lib = importlib.import_module("andesvl_jax.decoding.probe")  # the package's `probe` is the function
SETS = (*STORED, *ODD)
QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}


class GoldenTokenizer:
    """The vocabulary of the golden sets: a text is its ids, written as numbers with spaces, or a word of the format."""

    words = {"\n": 10, "user\n": (20, 10), "assistant\n": (21, 10), "system\n": (22, 10)}
    im_start_id, im_end_id, image_start_id, image_end_id, image_token_id = 501, 502, 503, 504, 505

    def encode(self, text, allowed=frozenset()):
        if text in self.words:
            return list(np.atleast_1d(self.words[text]))
        return [int(number) for number in text.split()]

    def token_id(self, name):
        return {"<think>": 506}[name]


def prompt_of(ids: list[int]) -> list[int]:
    """The ids that `render_prompt` makes of the conversation that a golden prompt holds."""
    turns = [turn.split() for turn in " ".join(map(str, ids)).split("501 ")[1:]]
    roles = {"20": "user", "21": "assistant", "22": "system"}
    messages, counts = [], []
    for role, _, *content in turns[:-1]:
        items, text = [], []
        for token in content[:-2]:  # without the end of the turn
            if token in ("503", "504"):
                items.append({"type": "text", "text": " ".join(text)} if token == "503" else {"type": "image"})
                counts += [len(text)] if token == "504" else []
                text = []
            else:
                text.append(token)
        messages.append({"role": roles[role], "content": [*items, {"type": "text", "text": " ".join(text)}]})
    return chat.render_prompt(messages, GoldenTokenizer(), counts, thinking=ids[-1] == 506)


@functools.cache
def two_conversations():
    """A network, two conversations with two and one images for one row, and their hidden states by the reference."""
    config = ODD["odd siglip2"]
    rng = np.random.default_rng(5)
    samples = [random_sample(config, rng, ((4, 6), (2, 4))), random_sample(config, rng, ((6, 2),))]
    params, processor = tiny_params(config), ImageProcessor(config.vision.patch_size)
    tensors = params_to_hf(params, config)
    expected = [
        activations(config, tensors, s.tokens, [i.canvas for i in s.images], processor.mean, processor.std)["final_hidden"]
        for s in samples
    ]
    return config, params, samples, np.concatenate(expected)


def check(name: str) -> dict[str, float]:
    """What deviates in a golden set or in one of the other checks; the network is traced anew, with the patches of the moment."""
    if name in SETS:
        golden = golden_set(name)
        return deviations(avl.probe(golden.bundle, golden.input_ids, golden.images), golden.expected)
    if name == "greedy":
        golden = golden_set("aimv2_c_multi_image_text")
        ids = avl.generate(golden.bundle, golden.input_ids, golden.images, len(golden.greedy_ids), stop_ids=())
        return {} if np.array_equal(ids, golden.greedy_ids) else {"greedy_ids": np.inf}
    if name == "prompt":
        prompts = [golden_set(stored).input_ids.tolist() for stored in STORED]
        return {} if [prompt_of(ids) for ids in prompts] == prompts else {"input_ids": np.inf}
    config, params, samples, expected = two_conversations()
    batch = packing.assemble([samples], packing.Budget(1, 64, 64, 24), config.vision.patch_features)
    first, second = (len(s.tokens) for s in samples)
    if name == "layout":
        laid = np.r_[np.arange(first), np.arange(second), np.full(64 - first - second, -1)]
        return {} if np.array_equal(batch.positions[0], laid) else {"positions": np.inf}
    hidden = jax.jit(lambda *args: andesvl.forward(*args), static_argnums=1, compiler_options=QUICK_TO_COMPILE)(
        params, config, batch
    )
    return deviations({"final_hidden": np.asarray(hidden[0, : first + second])}, {"final_hidden": expected})


def fails(name: str) -> bool:
    try:
        return bool(check(name))
    except avl.UserError:  # a wrong size of the canvas does not fit the prompt
        return True


CHECKS = (*SETS, "greedy", "prompt", "layout", "packed row")


@pytest.fixture
def patch(monkeypatch):
    """monkeypatch with caches out of the way: what was compiled for the right network must not answer."""

    def anew(jitted, **options):  # unoptimized: each program runs once
        return jax.jit(lambda *args: jitted.__wrapped__(*args), compiler_options=QUICK_TO_COMPILE, **options)

    monkeypatch.setattr(probe_lib, "_activations", anew(probe_lib._activations, static_argnums=1))
    monkeypatch.setattr(state_lib, "visual_tokens", anew(state_lib.visual_tokens, static_argnums=1))
    monkeypatch.setattr(state_lib, "prefill", anew(state_lib.prefill, static_argnums=(1, 6, 7)))
    monkeypatch.setattr(state_lib, "decode_until", anew(state_lib.decode_until, static_argnums=1))
    return monkeypatch


@pytest.mark.parametrize("name", CHECKS)
def test_the_right_network_passes_every_check(name, patch):
    assert not check(name)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_variant_is_noticed(name, patch):
    make, noticed_by = MUTATIONS[name]
    assert noticed_by and set(noticed_by) <= set(CHECKS)
    make(patch)
    assert [golden for golden in noticed_by if not fails(golden)] == []
