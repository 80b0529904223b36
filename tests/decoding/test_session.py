"""Sessions: turns, eviction before the question, drafts and restored states give the tokens of one plain run."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import IMAGE_TOKEN, tiny_config, tiny_params

import andesvl_jax as avl
from andesvl_jax.cache.eviction import Eviction
from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.decoding.api import prompt_sample, stream
from andesvl_jax.decoding.sampling import sampling_options
from andesvl_jax.decoding.session import Session
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.image import ImageProcessor

CONFIG = tiny_config(text={"tie_word_embeddings": False, "max_position_embeddings": 4096})
NEW = 10
WARM = {"temperature": [0.0, 1.3, 0.8], "top_k": [0, 20, 0], "seed": [1, 2, 3], "repetition_penalty": [1.0, 1.2, 1.0]}
WARM |= {"presence_penalty": [0.0, 0.0, 2.0]}


@functools.cache
def bundle() -> Bundle:
    processor = ImageProcessor(patch_size=2, max_size=24)
    return Bundle(CONFIG, tiny_params(CONFIG, seed=2), None, processor, {"eos_token_id": [63]})


def prompt(seed: int, text: int, picture: bool = False):
    rng = np.random.default_rng(seed)
    ids, pictures = list(rng.integers(0, IMAGE_TOKEN, text)), []
    if picture:
        pictures = [rng.integers(0, 256, (9, 14, 3), dtype=np.uint8)]
        ids[3:3] = [IMAGE_TOKEN] * bundle().image_processor.visual_tokens(14, 9)
    return ids, pictures


def sample(seed: int, text: int, picture: bool = False):
    return prompt_sample(bundle(), *prompt(seed, text, picture))


def batch():
    return [sample(0, 12, picture=True), sample(1, 31), sample(2, 20, picture=True)]


def answers(session: Session, options=None, new: int = NEW, stop=()) -> list[list[int]]:
    *_, ids = session.generate(sampling_options(len(session.lengths)) if options is None else options, new, stop)
    return [row.tolist() for row in ids]


def test_a_prompt_in_pieces_is_the_prompt_at_once():
    """Rows of different lengths are cut in different places, pictures included."""
    whole = Session(bundle())
    whole.extend(batch())
    pieces = Session(bundle())
    ids, pictures = zip(*(prompt(*p) for p in ((0, 12, True), (1, 31), (2, 20, True))))
    cuts = [len(i) - 6 for i in ids]
    pieces.extend([prompt_sample(bundle(), i[:c], p) for i, c, p in zip(ids, cuts, pictures)])
    pieces.extend([prompt_sample(bundle(), i[c : c + 5], ()) for i, c in zip(ids, cuts)])
    pieces.extend([prompt_sample(bundle(), i[c + 5 :], ()) for i, c in zip(ids, cuts)])
    # float32 attention over the same keys in other slots and blocks
    np.testing.assert_allclose(pieces.state.last, whole.state.last, atol=2e-5)
    assert pieces.lengths == whole.lengths == [len(i) for i in ids]
    assert answers(pieces) == answers(whole)
    assert pieces.prefilled == whole.prefilled == sum(map(len, ids))


def test_the_second_question_about_a_long_context_costs_its_own_tokens():
    context, first, second = (prompt(seed, n)[0] for seed, n in ((5, 2048), (6, 9), (7, 11)))
    session = Session(bundle())
    *_, one = stream(bundle(), [prompt_sample(bundle(), context + first, ())], NEW, stop_ids=(), session=session)
    assert session.prefilled == 2048 + 9
    ids = context + first + one.ids[0].tolist() + second
    *_, two = stream(bundle(), [prompt_sample(bundle(), ids, ())], NEW, stop_ids=(), session=session)
    assert session.prefilled == 2048 + 9 + 11
    *_, alone = stream(bundle(), [prompt_sample(bundle(), ids, ())], NEW, stop_ids=())
    np.testing.assert_array_equal(two.ids[0], alone.ids[0])
    # another question about the same context takes back the first one and its answer
    ids = context + second
    *_, three = stream(bundle(), [prompt_sample(bundle(), ids, ())], NEW, stop_ids=(), session=session)
    assert session.prefilled == 2048 + 9 + 2 * 11
    *_, alone = stream(bundle(), [prompt_sample(bundle(), ids, ())], NEW, stop_ids=())
    np.testing.assert_array_equal(three.ids[0], alone.ids[0])


def test_a_picture_is_reused_only_if_it_is_the_same_picture():
    ids, pictures = prompt(0, 12, picture=True)
    other = [np.random.default_rng(9).integers(0, 256, pictures[0].shape, dtype=np.uint8)]
    for shown, again in ((pictures, 2), (other, len(ids) - 3)):
        session = Session(bundle())
        session.follow(prompt_sample(bundle(), ids, pictures))
        before = session.prefilled
        changed = ids[:-2] + [5, 7]
        session.follow(prompt_sample(bundle(), changed, shown))
        assert session.prefilled - before == again
        fresh = Session(bundle())
        fresh.extend([prompt_sample(bundle(), changed, shown)])
        assert answers(session) == answers(fresh)


@pytest.mark.parametrize("policy", ["okv", "snapkv", "streaming"])
def test_a_context_is_evicted_before_the_question_is_seen(policy):
    context, question = prompt(3, 64)[0], prompt(4, 8)[0]

    def run(budget):
        session = Session(bundle(), observe=16)
        session.extend([prompt_sample(bundle(), context, ())])
        session.evict(Eviction(policy, budget))
        kept = int((np.asarray(session.state.cache.positions) >= 0).sum(-1).max())
        session.extend([prompt_sample(bundle(), question, ())])
        return kept, answers(session)

    whole = Session(bundle())
    whole.extend([prompt_sample(bundle(), context + question, ())])
    assert run(1.0) == (64, answers(whole))  # all kept: the question sees the whole context
    kept, _ = run(0.25)
    assert kept <= 20  # 16 slots a head on average, 5 / 4 of it at most in one


def test_evicting_needs_evidence():
    session = Session(bundle(), observe=8)
    session.extend([sample(1, 20)])
    with pytest.raises(UserError, match=r"last 16 tokens are not held, expected an extend with Session\(observe=16\)"):
        session.evict(Eviction("okv", 0.5))


def drafts(plain: list[list[int]], done: list[int], width: int, seed: int):
    """A tree for each row around the tokens that plain decoding gives: the right path, cut short, among wrong branches."""
    rng = np.random.default_rng(seed)
    tokens, parents = np.full((len(plain), width), -1, np.int32), np.full((len(plain), width), -2, np.int32)
    for row, (right, n) in enumerate(zip(plain, done, strict=True)):
        upcoming = right[n + 1 : n + 1 + rng.integers(0, 4)]  # right[n] is the root
        last = -1
        for node in range(width):
            if upcoming and rng.random() < 0.6:
                tokens[row, node], parents[row, node] = upcoming.pop(0), last
                last = node
            else:
                tokens[row, node] = rng.integers(0, IMAGE_TOKEN)
                parents[row, node] = rng.integers(-2, node)
    return tokens, parents


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_accepted_drafts_are_the_tokens_of_plain_decoding(warm, kind):
    """Token for token, greedy and sampled with filters and penalties, whatever is drafted; rows accept unequal numbers."""
    options = sampling_options(3, **(WARM if warm else {}))
    plain_session = Session(bundle(), kind=kind)
    plain_session.extend(batch())
    plain = answers(plain_session, options, 24)
    stop = plain[1][17]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in plain]
    session = Session(bundle(), kind=kind)
    session.extend(batch())
    session.begin(24)
    found, passes = [[], [], []], 0
    while not all(len(f) == len(e) for f, e in zip(found, expected)):
        verified = session.verify(*drafts(plain, [min(len(f), 23) for f in found], 6, passes), options)
        found = [ids.tolist() for ids in session.accept(verified, (stop,), 24)]
        passes += 1
        assert passes < 30, (found, expected)
    assert found == expected
    assert passes < max(map(len, expected))  # several tokens a pass
    assert session.lengths == [n + len(e) for n, e in zip([len(s.tokens) for s in batch()], expected)]
    np.testing.assert_array_equal(session.state.cache.length, session.lengths)


def test_steps_are_the_tokens_of_one_run():
    options = sampling_options(3, **WARM)
    whole, stepwise = Session(bundle()), Session(bundle())
    whole.extend(batch()), stepwise.extend(batch())
    expected = answers(whole, options)
    stepwise.begin(NEW)
    for n in range(1, NEW + 1):
        assert [ids.tolist() for ids in stepwise.step(options)] == [row[:n] for row in expected]


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_a_saved_session_goes_on_bit_for_bit(kind, tmp_path):
    options = sampling_options(3, **WARM)
    session = Session(bundle(), observe=16, kind=kind)
    session.extend(batch())
    answers(session, options)
    session.save(tmp_path / "s")
    restored = Session.restore(bundle(), tmp_path / "s")
    assert restored.lengths == session.lengths and restored.prefilled == session.prefilled
    for each in (session, restored):
        each.extend([sample(7, 5), sample(8, 9), sample(9, 3)])
    np.testing.assert_array_equal(restored.state.last, session.state.last)
    assert answers(restored, options) == answers(session, options)


def test_what_is_no_session_of_this_model_is_refused(tmp_path):
    session = Session(bundle())
    with pytest.raises(UserError, match="holds no token yet"):
        session.save(tmp_path / "s")
    session.extend([sample(1, 9)])
    session.save(tmp_path / "s")
    other = dataclasses.replace(bundle(), params=tiny_params(CONFIG, seed=3))
    with pytest.raises(UserError, match="a session of model"):
        Session.restore(other, tmp_path / "s")
    about = (tmp_path / "s" / "session.json").read_text()
    for changed, message in (
        (about.replace("andesvl session 1", "x"), "not a session"),
        (about.replace('"observe": 0', '"observe": -1'), "not a session"),
        (about.replace('"layout": {', '"layout": {"more": 1, '), "more is 1, expected None"),
        (about.replace("bool", "int8", 1), "expected .*bool"),
        ("{", "session.json"),
    ):
        (tmp_path / "s" / "session.json").write_text(changed)
        with pytest.raises(UserError, match=message):
            Session.restore(bundle(), tmp_path / "s")
    (tmp_path / "s" / "session.json").write_text(about)
    whole = (tmp_path / "s" / "session.safetensors").read_bytes()
    (tmp_path / "s" / "session.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="not a session"):
        Session.restore(bundle(), tmp_path / "s")
    with pytest.raises(UserError):
        Session.restore(bundle(), tmp_path / "nothing")


def test_rows_that_do_not_fit_are_refused():
    session = Session(bundle())
    session.extend([sample(1, 9), sample(2, 9)])
    with pytest.raises(UserError, match="found 1 rows, expected 2"):
        session.extend([sample(1, 9)])
    with pytest.raises(UserError, match="expected one to follow"):
        session.follow(sample(1, 9))
    with pytest.raises(UserError, match="expected at most 4096"):
        session.extend([sample(1, 4088), sample(2, 9)])
    with pytest.raises(avl.UserError, match="another model"):
        list(stream(dataclasses.replace(bundle()), [sample(1, 9)], 1, session=Session(bundle())))
    assert jnp.all(session.state.cache.length == 9)
