"""Run by test_sharded_generation.py with eight CPU devices: one batch generated on a mesh, as one JSON line."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import IMAGE_TOKEN, tiny_config, tiny_params

from andesvl_jax.cache.eviction import Eviction
from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.decoding.api import prompt_sample
from andesvl_jax.decoding.sampling import sampling_options
from andesvl_jax.decoding.session import Session
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.training.sharding import IN_USE, make_mesh, param_shardings

CONFIG = tiny_config(text={"tie_word_embeddings": False})
ROWS, NEW = 4, 12
bundle = Bundle(CONFIG, tiny_params(CONFIG, seed=2), None, ImageProcessor(patch_size=2, max_size=24), {})
rng = np.random.default_rng(0)
picture = rng.integers(0, 256, (9, 14, 3), dtype=np.uint8)
slots = [IMAGE_TOKEN] * bundle.image_processor.visual_tokens(14, 9)
ids = [[*rng.integers(0, IMAGE_TOKEN, 5 + 3 * row), *slots, *rng.integers(0, IMAGE_TOKEN, 8)] for row in range(ROWS)]
options = sampling_options(ROWS, temperature=[0.0, 1.2, 0.8, 0.0], seed=[1, 2, 3, 4], presence_penalty=[0, 0, 1.0, 0])


def run(text: str) -> dict:
    mesh = None if text == "none" else make_mesh(text)
    model = bundle
    if mesh is not None:
        model = replace(bundle, params=jax.device_put(bundle.params, param_shardings(CONFIG, mesh, IN_USE)))
    session = Session(model, observe=16, mesh=mesh)
    session.extend([prompt_sample(bundle, row, [picture]) for row in ids])
    *_, first = session.generate(options, NEW)
    session.extend([prompt_sample(bundle, row[-7:], []) for row in ids])
    session.evict(Eviction("okv", 0.5))
    *_, second = session.generate(options, NEW)
    keys = jax.tree.leaves(session.state.cache.keys)[0]
    return {
        "answers": [[row.tolist() for row in answers] for answers in (first, second)],
        "share_of_cache": keys.addressable_shards[0].data.size / keys.size,
    }


print(json.dumps({text: run(text) for text in sys.argv[1:]}))
