"""Run by test_sharding.py with four CPU devices: bytes of temporaries that a step on one long row takes of a device, for every
mesh named on the command line, as one JSON line."""

import json
import math
import re
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import tiny_config

from andesvl_jax.aot import step_cost
from andesvl_jax.inputs.packing import Budget
from andesvl_jax.training.config import TrainConfig
from andesvl_jax.training.sharding import make_mesh

WIDE = {"num_layers": 1, "hidden_size": 64, "intermediate_size": 256}
RUN = TrainConfig(model=tiny_config(vision=WIDE, text=WIDE, remat="layer", attention_chunk=16), budget=Budget(1, 4096, 4096, 512))


def run(text: str) -> int:
    devices = jax.devices()[: math.prod(map(int, re.findall(r"\d+", text)))]
    return step_cost(RUN, make_mesh(text, devices), "train", limit=None).hbm["temporaries"]


print(json.dumps({text: run(text) for text in sys.argv[1:]}))
