"""Runs are described by Python files and changed by --set; wrong names and values are refused by name."""

import pytest

from andesvl_jax.data.mixture import Mixture
from andesvl_jax.errors import UserError
from andesvl_jax.training.config import TrainConfig, load_config, with_changes


def test_set_reaches_nested_fields_and_keeps_the_rest():
    changed = with_changes(
        TrainConfig(), ["steps=70", "optimizer.decoder=1e-4", "model.dtype=bfloat16", "data.weights={'word': 1.0}"]
    )
    assert (changed.steps, changed.optimizer.decoder, changed.model.dtype) == (70, 1e-4, "bfloat16")
    assert changed.data.weights == {"word": 1.0} and changed.optimizer.vision == TrainConfig().optimizer.vision


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.decodr=1", "did you mean 'decoder'"),
        ("steps", "expected key=value"),
        ("steps=many", "expected a number"),
        ("steps=0", "at least 1"),
        ("steps=20", "more than warmup_steps"),
        ("steps.more=1", "inside a plain value"),
        ("model.text.num_kv_heads=3", "divisor of num_heads"),
        ("data.weights={}", "the dataset is empty"),
        ("data.weights={'cats': 1.0}", "expected families among"),
    ],
)
def test_a_wrong_change_is_refused_in_one_sentence(change, message):
    with pytest.raises(UserError, match=message) as error:
        with_changes(TrainConfig(), [change])
    assert "\n" not in str(error.value)


def test_a_config_file_must_exist_and_have_get_config(tmp_path):
    with pytest.raises(UserError, match="no such config file"):
        load_config(str(tmp_path / "none.py"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="get_config"):
        load_config(str(tmp_path / "empty.py"))


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(UserError, match="the dataset is empty"):
        Mixture({"word": 0.0})


def test_the_committed_configs_load():
    assert load_config("configs/demo.py").steps > 0
