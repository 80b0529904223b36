"""Run by test_adapters.py with eight CPU devices: adapters over dense and packed bases, on one device and on a mesh."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import random_sample, tiny_batch, tiny_config, tiny_params

from andesvl_jax.training.collectives import collectives
from andesvl_jax.training.config import Adapters, Optimizer, TrainConfig
from andesvl_jax.training.sharding import batch_sharding, make_mesh
from andesvl_jax.training.step import init_state, train_step, trainable
from andesvl_jax.weights import ALL_MATRICES, Int4, Quantize, Recipe, Rule, represent
from andesvl_jax.weights.partition import partition

CONFIG = tiny_config(vision={"num_layers": 1})
RUN = TrainConfig(
    model=CONFIG, init_from="a base", optimizer=Optimizer(5e-3, 5e-3, 5e-3, warmup_steps=1), steps=20,
    adapters=Adapters(vision=2, projector=2, decoder=2),
)  # fmt: skip
rng = np.random.default_rng(0)
BATCH = tiny_batch(CONFIG, [[random_sample(CONFIG, rng)] for _ in range(8)], tokens=32, patches=32)


def run(params, recipe: Recipe, mesh) -> dict:
    state = init_state(RUN, jax.tree.map(jax.numpy.copy, params), mesh, recipe)  # a step takes the base's memory, too
    batch = BATCH if mesh is None else jax.device_put(BATCH, batch_sharding(mesh))
    step = train_step.lower(state, batch, CONFIG, RUN.optimizer, RUN.steps, mesh, recipe=recipe).compile()
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch, RUN.steps)
        losses.append(float(metrics["loss"]))
    moments = sum(x.nbytes for x in jax.tree.leaves(state.optimizer) if x.ndim)
    summed = sum(c.times * c.bytes for c in collectives(step.as_text()) if c.kind == "all-reduce")
    return {"losses": losses, "summed": summed, "moment_bytes": moments}


def both(base_rules: tuple) -> dict:
    recipe = Recipe(base_rules + RUN.adapters.rules)
    params = represent(tiny_params(CONFIG), recipe, jax.random.key(1))
    trained, _ = partition(params, trainable(RUN.optimizer, recipe))
    found = {"one": run(params, recipe, None), "mesh": run(params, recipe, make_mesh("fsdp=8"))}
    return found | {"adapter_bytes": sum(x.nbytes for x in jax.tree.leaves(trained))}


BASES = {"dense": (), "packed": (Rule(ALL_MATRICES, Quantize(Int4(8))),)}
print(json.dumps(both(BASES[sys.argv[1]])))
