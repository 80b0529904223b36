"""Prompts and training rows are laid out by different functions, and each says so."""

import numpy as np
import pytest
from tiny import random_sample, tiny_config

from andesvl_jax.errors import UserError
from andesvl_jax.inputs.packing import assemble_prompts


def test_a_supervised_sample_is_no_prompt():
    config = tiny_config()
    sample = random_sample(config, np.random.default_rng(0))
    with pytest.raises(UserError, match=rf"prompt 0 has {sample.targets} supervised tokens, expected none.*`assemble`"):
        assemble_prompts([sample], config.vision.patch_features)
