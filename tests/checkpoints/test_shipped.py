"""The models that ship: found by name, small, and trained: they answer what training never showed them."""

import json
import math
from pathlib import Path

import pytest

import andesvl_jax as avl
from andesvl_jax.checkpoints.locate import SHIPPED, shipped_directory, shipped_models
from andesvl_jax.config import CONFIGS
from andesvl_jax.evaluation.benchmarks import NANO_TARGETS, nano_validation
from andesvl_jax.evaluation.evaluate import evaluate, evaluate_long

MODELS = ("nano", "nano-siglip")
ITEMS = 30  # of a task
RESULTS = Path(__file__).resolve().parents[2] / "results"  # what the cards are made of
LEARNED = 0.8  # accuracy from which on a task counts as learned
CODES = {"nano": (2048, 0.9)}  # tokens of the texts, and the same


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_ships_is_small_and_in_bfloat16(name):
    assert shipped_models() == list(MODELS)
    weights = SHIPPED / name / "model.safetensors"
    assert weights.stat().st_size <= 24e6
    bundle = avl.load(name)
    config = CONFIGS[name].replace(image_token_id=bundle.tokenizer.image_token_id)
    assert bundle.config == config and bundle.tokenizer.vocab_size <= config.text.vocab_size
    assert (SHIPPED / name / "README.md").read_text(encoding="utf-8").startswith(f"# {name}\n")


def results(name: str) -> dict[str, dict]:
    """By task, what a card says."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["tasks"]


def test_nano_reached_every_target_beside_its_controls():
    """A retrained nano that is worse must not ship with floors that follow it down."""
    for task, target in NANO_TARGETS.items():
        found = results("nano")[task]
        assert found["accuracy"] >= target and found["n"] >= 490, (task, found)  # gui has 496 questions
        assert max(found["blind"], found["shuffled"]) < found["low"] - 0.3, (task, found)


def learned(name: str) -> dict[str, float]:
    """Rendered tasks that a card calls learned, and what ITEMS items stay above: two of them or 2.5 standard errors below it."""
    tasks = results(name)
    said = {item.task: tasks[item.task]["accuracy"] for item in nano_validation(1)}
    return {task: p - max(2 / ITEMS, 2.5 * math.sqrt(p * (1 - p) / ITEMS)) for task, p in said.items() if p >= LEARNED}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_ships_answers_what_it_never_saw_and_not_without_the_picture(name):
    floors = learned(name)
    assert {"count", "colour", "position", "word", "handwritten"} <= set(floors)
    found = evaluate(avl.load(name, decode_only=True), [i for i in nano_validation(ITEMS, seed=77) if i.task in floors])
    assert set(found) == set(floors)
    for task, floor in floors.items():
        assert found[task].accuracy >= floor and found[task].blind <= 0.35, (task, found[task])


@pytest.mark.parametrize("name", CODES)
def test_a_model_that_ships_finds_codes_in_a_text(name):
    tokens, floor = CODES[name]
    result = evaluate_long(avl.load(name, decode_only=True), ("niah_single",), (tokens,), ITEMS)[f"niah_single@{tokens}"]
    assert result.accuracy >= floor and result.blind == 0 and result.shuffled <= 0.1, result


def test_a_directory_of_that_name_goes_first_and_no_name_leaves_the_package(tmp_path, monkeypatch):
    assert shipped_directory("nano") == SHIPPED / "nano"
    assert [shipped_directory(name) for name in ("..", "../shipped/nano", "", "nano/", "Nano", "andesvl-4b")] == [None] * 6
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir(tmp_path)
    assert shipped_directory("nano") is None
    with pytest.raises(avl.UserError, match=r"one that ships: nano, nano-siglip\."):
        avl.load("mega")
