"""The input pipeline: every sample appears once, in any packing, and its state is its place."""

import numpy as np
import pytest

from andesvl_jax.data.examples import Example, Turn
from andesvl_jax.data.pipeline import LOOK_AHEAD, Mixture, PackedBatches, examples, to_sample
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.packing import Budget
from andesvl_jax.inputs.tokenizer import Tokenizer


@pytest.fixture
def samples(tiny_run):
    tokenizer = Tokenizer.load(tiny_run.tokenizer)
    processor = ImageProcessor.from_hf({}, tiny_run.model.vision)
    return examples(tiny_run.data).map(lambda example: to_sample(example, tokenizer, processor))


def conversations(batch) -> list[bytes]:
    out = []
    for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
        out += [tokens[segments == s].tobytes() for s in range(segments.max() + 1)]
    return out


def test_every_sample_is_packed_once_and_none_is_lost(samples, tiny_run):
    iterator = iter(PackedBatches(samples, tiny_run.budget, tiny_run.model.vision.patch_features))
    seen = [c for _ in range(12) for c in conversations(next(iterator))]
    state = iterator.get_state()
    waiting = {i for i in state["waiting"] if i >= 0}
    expected = [samples[i].tokens.tobytes() for i in range(state["next"]) if i not in waiting]
    assert sorted(seen) == sorted(expected) and len(waiting) <= LOOK_AHEAD


def test_a_restored_iterator_goes_on_with_the_same_batches(samples, tiny_run):
    def fresh():
        return iter(PackedBatches(samples, tiny_run.budget, tiny_run.model.vision.patch_features))

    first, second = fresh(), fresh()
    for _ in range(3):
        next(first)
    second.set_state(first.get_state())
    for _ in range(3):
        a, b = next(first), next(second)
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.images.patches, b.images.patches)


def test_rows_are_well_filled(samples, tiny_run):
    """Best fit with look-ahead on the text budget; 0.8 leaves room for the small rows of this test."""
    iterator = iter(PackedBatches(samples, tiny_run.budget, tiny_run.model.vision.patch_features))
    assert np.mean([np.mean(next(iterator).segments >= 0) for _ in range(20)]) > 0.8


def test_a_sample_beyond_the_budget_is_named(samples):
    with pytest.raises(UserError, match=r"sample 0 has \d+ tokens"):
        next(iter(PackedBatches(samples, Budget(1, 8, 8, 8), 588)))


def test_supervised_tokens_are_the_answers(tiny_run):
    tokenizer = Tokenizer.load(tiny_run.tokenizer)
    processor = ImageProcessor.from_hf({}, tiny_run.model.vision)
    picture = np.zeros((27, 27, 3), np.uint8)
    example = Example((picture,), (Turn("count", "How many?", "3"), Turn("colour", "Which colour?", "red")), "x")
    sample = to_sample(example, tokenizer, processor)
    assert tokenizer.decode(sample.tokens[sample.supervised], skip_special=False) == "3<|im_end|>red<|im_end|>"


def test_mixture_weights_are_kept():
    dataset = examples(Mixture({"word": 3.0, "number": 1.0}))
    tasks = [dataset[i].turns[0].task for i in range(400)]
    assert abs(tasks.count("word") / 400 - 0.75) < 0.02
