"""A training run small enough to repeat: a tiny network on two task families, with the demo's own tokenizer recipe."""

import pytest

from andesvl_jax.config import AndesVLConfig, TextConfig, VisionConfig
from andesvl_jax.data.corpus import corpus, train_tokenizer
from andesvl_jax.data.mixture import Mixture
from andesvl_jax.inputs.packing import Budget
from andesvl_jax.training.config import Optimizer, TrainConfig


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(corpus(0, examples=200), path / "tokenizer.json", vocab_size=1024)
    return path


@pytest.fixture
def tiny_run(tokenizer_dir) -> TrainConfig:
    """Four steps of two rows, a checkpoint after every second one."""
    model = AndesVLConfig(
        vision=VisionConfig(hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, table_side=4),
        text=TextConfig(
            vocab_size=1050, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
            max_position_embeddings=512,
        ),
    )  # fmt: skip
    return TrainConfig(
        model=model, tokenizer=str(tokenizer_dir), data=Mixture({"word": 2.0, "shapes": 1.0}), steps=4, checkpoint_every=2,
        budget=Budget(rows=2, tokens=384, patches=128, targets=160), log_every=1, optimizer=Optimizer(warmup_steps=2),
    )  # fmt: skip
