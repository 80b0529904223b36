"""One saved model."""

from pathlib import Path

import pytest
from directories import CONFIGS, bundle_of

import andesvl_jax as avl


@pytest.fixture
def model(tmp_path) -> Path:
    avl.save(bundle_of(CONFIGS["aimv2"]), tmp_path / "model")
    return tmp_path / "model"
