"""The input pipeline: every sample appears once, in any packing and on any number of hosts, and its state is its place."""

import json
import logging
import re
from dataclasses import replace

import grain
import numpy as np
import pytest
from tiny import random_sample, tiny_config

from andesvl_jax.data.examples import Example, Turn
from andesvl_jax.data.mixture import RESIZES, Bad, Mixture, examples
from andesvl_jax.data.pipeline import (
    LOOK_AHEAD,
    PackedBatches,
    PackedByProcesses,
    batches,
    join_states,
    samples_of,
    scaled,
    to_sample,
)
from andesvl_jax.data.sources import messages_of
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.packing import Budget, fill
from andesvl_jax.inputs.tokenizer import Tokenizer


@pytest.fixture
def samples(tiny_run):
    tokenizer = Tokenizer.load(tiny_run.tokenizer)
    return samples_of(tiny_run.data, tokenizer, ImageProcessor.from_hf({}, tiny_run.model.vision))


def packed(samples, run, **changes):
    return iter(PackedBatches(samples, run.budget, run.model.vision.patch_features, **changes))


def conversations(batch) -> list[bytes]:
    """Everything that belongs to each conversation of a batch: tokens, labels, the pixels of its pictures."""
    out = []
    for r in range(len(batch.tokens)):
        for s in range(batch.segments[r].max() + 1):
            here = batch.segments[r] == s
            learned = here[batch.target_slots[r]] & (batch.target_slots[r] >= 0)
            visual = batch.visual_index[r][here & (batch.visual_index[r] >= 0)]
            patches = batch.images.patches[r].reshape(-1, 4, batch.images.patches.shape[-1])[visual]
            out.append(b"".join(x.tobytes() for x in (batch.tokens[r][here], batch.targets[r][learned], patches)))
    return out


def contents(sample) -> bytes:
    targets = sample.tokens[1:][sample.supervised[1:]]
    return b"".join(x.tobytes() for x in (sample.tokens, targets, *(image.patches for image in sample.images)))


def assert_equal(a, b):
    for name in ("tokens", "positions", "segments", "visual_index", "target_slots", "targets", "target_weights"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_array_equal(a.images.patches, b.images.patches)


@pytest.mark.parametrize("shards", [1, 2])
def test_packed_contents_are_the_sources_contents_each_once(samples, tiny_run, shards):
    iterator = packed(samples, tiny_run, shards=shards)
    seen = [c for _ in range(12) for c in conversations(next(iterator))]
    state = json.loads(json.dumps(iterator.get_state()))
    expected = []
    for shard, place in state.items():
        assert len(place["waiting"]) <= LOOK_AHEAD and len(json.dumps(place)) < 400, "the state stays small"
        placed = set(range(place["drawn"])) - set(place["waiting"])
        expected += [contents(samples[int(shard) + shards * i]) for i in placed]
    assert sorted(seen) == sorted(expected)


def test_a_restored_iterator_goes_on_with_the_same_batches(samples, tiny_run):
    first, second = packed(samples, tiny_run, shards=2), packed(samples, tiny_run, shards=2)
    for _ in range(3):
        next(first)
    second.set_state(json.loads(json.dumps(first.get_state())))
    for _ in range(3):
        assert_equal(next(first), next(second))
    assert first.get_state() == second.get_state()


def test_hosts_make_the_rows_of_one_host_also_after_their_number_changes(tiny_run):
    """Two hosts, then one, then two again; what a host makes are its rows of the batch that one host makes alone."""
    mixture = Mixture(tiny_run.data.weights, shards=2)
    tokenizer, features = Tokenizer.load(tiny_run.tokenizer), tiny_run.model.vision.patch_features
    processor = ImageProcessor.from_hf({}, tiny_run.model.vision)

    def host(number, hosts):
        return iter(batches(mixture, tokenizer, processor, tiny_run.budget, features, host=number, hosts=hosts))

    whole = host(0, 1)
    expected = [next(whole) for _ in range(9)]
    state = None
    for start, hosts in ((0, 2), (3, 1), (6, 2)):
        workers = [host(number, hosts) for number in range(hosts)]
        for worker in workers if state else ():
            worker.set_state(state)
        for step in range(start, start + 3):
            parts = [next(worker) for worker in workers]
            joined = np.concatenate([part.tokens for part in parts])
            np.testing.assert_array_equal(joined, expected[step].tokens)
            np.testing.assert_array_equal(np.concatenate([p.images.patches for p in parts]), expected[step].images.patches)
        state = join_states(worker.get_state() for worker in workers)


def test_processes_make_the_rows_of_threads_also_after_a_resume_with_other_ones(tiny_run):
    """Threads, then two processes from their state, then threads from that of the processes: one order of batches."""
    mixture = Mixture(tiny_run.data.weights, shards=2)
    tokenizer, features = Tokenizer.load(tiny_run.tokenizer), tiny_run.model.vision.patch_features
    processor = ImageProcessor.from_hf({}, tiny_run.model.vision)
    make = lambda workers: iter(batches(mixture, tokenizer, processor, tiny_run.budget, features, workers=workers))  # noqa: E731
    alone = make(0)
    expected, state = [next(alone) for _ in range(6)], None
    for start, workers in ((0, 0), (2, 2), (4, 0)):
        made = make(workers)
        if state is not None:
            made.set_state(json.loads(json.dumps(state)))
        for batch in expected[start : start + 2]:
            assert_equal(next(made), batch)
        state = made.get_state()
        made.close()
    assert set(state) == set(make(2).get_state()) == {"0", "1"}, "also before the first batch"


def test_what_a_process_finds_wrong_is_said_here(tiny_run):
    bad = grain.MapDataset.range(10).map(lambda i: Bad(f"record {i} is odd")).repeat()
    with pytest.raises(UserError, match="records so far cannot be learned from, the last because: record"):
        next(iter(PackedByProcesses([PackedBatches(bad, tiny_run.budget, 588, max_bad=0.0005)])))


def test_a_state_or_a_number_of_shards_that_does_not_fit_is_named(samples, tiny_run):
    half = packed(samples, tiny_run, shards=2, host=1, hosts=2)
    with pytest.raises(UserError, match="the data state has shards 1, expected 0 too"):
        packed(samples, tiny_run, shards=2).set_state(half.get_state())
    with pytest.raises(UserError, match="data.shards is 3, expected a divisor of budget.rows = 2"):
        packed(samples, tiny_run, shards=3)
    with pytest.raises(UserError, match="data.shards is 1, expected a multiple of the number of hosts times workers, 2"):
        packed(samples, tiny_run, hosts=2)


def test_rows_are_well_filled(samples, tiny_run):
    """The tightest budget, here tokens, where a row holds several scenes; also in the long run, when large samples piled up."""
    iterator = packed(samples, replace(tiny_run, budget=Budget(2, 1024, 1024, 1024)))
    assert np.mean([fill(next(iterator))["tokens"] for _ in range(60)]) > 0.95


def test_members_of_a_pair_share_a_row_side_by_side_also_after_a_resume():
    """Chosen and rejected answer: never apart, never one without the other; of pairs too large for a row neither is used."""
    config, rng = tiny_config(), np.random.default_rng(0)
    pairs = [tuple(random_sample(config, rng, ((2, 2 * k),), text=6 + k) for k in rng.integers(1, 4, 2)) for _ in range(60)]
    pairs[::6] = [tuple(random_sample(config, rng, ((2, 4),), text=31) for _ in "ab") for _ in pairs[::6]]  # 66 of 60 tokens
    source = grain.MapDataset.range(len(pairs)).map(lambda i: pairs[i]).repeat()
    dataset = PackedBatches(source, Budget(3, 60, 64, 40), config.vision.patch_features, 3, max_bad=1.0)
    known = {a.tokens.tobytes(): b.tokens.tobytes() for i, (a, b) in enumerate(pairs) if i % 6}
    iterator, seen = iter(dataset), set()
    for step in range(24):
        if step == 5:
            state, iterator = json.loads(json.dumps(iterator.get_state())), iter(dataset)
            iterator.set_state(state)
        batch = next(iterator)
        for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
            members = [tokens[segments == s].tobytes() for s in range(segments.max() + 1)]
            assert len(members) % 2 == 0
            assert [known[chosen] for chosen in members[::2]] == members[1::2]
            seen |= set(members[::2])
    assert seen == set(known), "every pair that fits a row was used"
    assert sum(place["bad"] for place in iterator.get_state().values()) > 10


def test_bad_records_are_skipped_counted_and_named_until_they_are_too_many(samples, tiny_run, caplog):
    every = 4
    broken = samples.map_with_index(lambda i, sample: Bad(f"a.json: record {i}: torn.") if i % every == 0 else sample)
    iterator = packed(broken, tiny_run, max_bad=0.05)
    with caplog.at_level(logging.WARNING), pytest.raises(UserError) as caught:
        for _ in range(100):
            next(iterator)
            assert iterator.get_state()["0"]["bad"] <= 0.05 * 1000
    assert re.search(r"51 of 20\d records .* a.json: record 200: torn.*above data.max_bad = 0.05", str(caught.value))
    assert [r.args[0].split()[0] for r in caplog.records] == ["1", "2", "4", "8", "16", "32"]
    good = packed(samples.map_with_index(lambda i, sample: Bad("torn") if i == 2 else sample), tiny_run)
    seen = [c for _ in range(3) for c in conversations(next(good))]
    state = good.get_state()["0"]
    assert state["bad"] == 1 and len(seen) + len(state["waiting"]) + 1 == state["drawn"]


def test_a_sample_beyond_the_budget_is_bad(samples):
    with pytest.raises(UserError, match=r"example \d+ of its shard has \d+ tokens, .* expected at most 8, 8 and 8 \(budget\)"):
        next(iter(PackedBatches(samples, Budget(1, 8, 8, 8), 588)))


def test_supervised_tokens_are_the_answers_each_with_its_end(tiny_run):
    tokenizer = Tokenizer.load(tiny_run.tokenizer)
    processor = ImageProcessor.from_hf({}, tiny_run.model.vision)
    picture = np.zeros((27, 27, 3), np.uint8)
    example = Example((picture,), (Turn("count", "How many?", "3"), Turn("colour", "Which colour?", "red")), "x")
    sample = to_sample(messages_of(example), tokenizer, processor)
    assert tokenizer.decode(sample.tokens[sample.supervised], skip_special=False) == "3<|im_end|>red<|im_end|>"


def test_shares_follow_weights_and_temperature():
    def share(**changes):
        dataset = examples(Mixture({"word": 9.0, "number": 1.0}, **changes))
        asked = [dataset[i][0]["content"][-1]["text"] for i in range(400)]
        numbers = {turn["content"][-1]["text"] for i in range(200) for turn in examples(Mixture({"number": 1.0}))[i][::2]}
        return np.mean([text in numbers for text in asked])

    assert abs(share() - 0.1) < 0.01 and abs(share(temperature=2.0) - 0.25) < 0.01


def test_a_limit_keeps_that_many_examples():
    dataset = examples(Mixture({"word": 1.0}, limits={"word": 3}))
    assert len({str(dataset[i]) for i in range(30)}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resize": "huge"}, "data.resize is 'huge', expected one of none, slight, wide, beta"),
        ({"temperature": 0.0}, "data.temperature is 0.0, expected at least 0.001"),
        ({"max_bad": 2.0}, "data.max_bad is 2.0, expected at least 0 and at most 1"),
        ({"shards": 0}, "data.shards is 0, expected at least 1"),
        ({"limits": {"word": 0}}, r"data.limits\['word'\] is 0, expected at least 1"),
        ({"limits": {"cats": 3}}, "data.limits names 'cats', expected one of word"),
    ],
)
def test_a_mixture_that_cannot_be_made_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Mixture({"word": 1.0}, **changes)


def test_resize_draws_have_their_distributions_and_belong_to_the_example(tiny_run):
    draws = {name: np.array([draw(np.random.default_rng([0, i])) for i in range(4000)]) for name, draw in RESIZES.items()}
    expected = {"none": (1, 1, 1), "slight": (0.8, 1.2, 1.0), "wide": (0.5, 2.0, 1.25), "beta": (0.5, 2.0, 0.5 + 1.5 * 2 / 7)}
    for name, (low, high, mean) in expected.items():
        assert low <= draws[name].min() and draws[name].max() <= high
        assert abs(draws[name].mean() - mean) < 0.02  # five standard errors of the widest draw
    tokenizer = Tokenizer.load(tiny_run.tokenizer)
    processor = ImageProcessor.from_hf({"min_tokens": 1}, tiny_run.model.vision)
    wide, again = (samples_of(Mixture({"word": 1.0}, resize="wide"), tokenizer, processor) for _ in range(2))
    assert [contents(wide[i]) for i in (5, 2)] == [contents(again[i]) for i in (5, 2)]
    assert len({wide[i].patches for i in range(20)}) > 3
    assert scaled(np.zeros((2, 9, 3), np.uint8), 0.1).size == (1, 1)
