"""The models that ship: found by name, small, and trained: they answer what training never showed them."""

import pytest

import andesvl_jax as avl
from andesvl_jax.checkpoints.hub import SHIPPED, shipped_directory, shipped_models
from andesvl_jax.config import CONFIGS
from andesvl_jax.evaluation.benchmarks import nano_validation
from andesvl_jax.evaluation.evaluate import evaluate, evaluate_long

MODELS = ("nano", "nano-siglip")
ITEMS = 40  # of a task
# accuracies on ITEMS items that a model stays above: about two standard errors below what its card says
FLOORS = {
    "nano": {
        "count": 0.95, "colour": 0.95, "position": 0.95, "thing": 0.93, "box": 0.9, "scene": 0.83, "word": 0.95, "number": 0.95,
        "handwritten": 0.87, "chart": 0.95, "bars": 0.91, "referring": 0.95, "grounding": 0.94, "screen_qa": 0.94, "labels": 0.95,
    },
    "nano-siglip": {"count": 0.95, "thing": 0.6, "word": 0.9, "number": 0.9, "handwritten": 0.8},
}  # fmt: skip
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


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_ships_answers_what_it_never_saw_and_not_without_the_picture(name):
    bundle = avl.load(name, decode_only=True)
    results = evaluate(bundle, [item for item in nano_validation(ITEMS, seed=77) if item.task in FLOORS[name]])
    assert set(results) == set(FLOORS[name])
    for task, floor in FLOORS[name].items():
        assert results[task].accuracy >= floor and results[task].blind <= 0.35, (task, results[task])


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
