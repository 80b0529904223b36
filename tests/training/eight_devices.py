"""Run by test_sharding.py with eight CPU devices: the same steps on every mesh named on the command line, as one JSON line.

For each mesh: losses; bytes of the sums of the compiled step, its other collectives by shape; weights that it has to gather by
shape, and the bytes of all of them.
"""

import json
import math
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import random_sample, tiny_batch, tiny_config, tiny_params

from andesvl_jax.model.andesvl import describe
from andesvl_jax.training.collectives import collectives
from andesvl_jax.training.config import Optimizer, TrainConfig
from andesvl_jax.training.sharding import STORED, batch_sharding, make_mesh, param_shardings
from andesvl_jax.training.step import init_state, train_step
from andesvl_jax.weights import is_param

CONFIG = tiny_config(vision={"num_layers": 1})
RUN = TrainConfig(model=CONFIG, optimizer=Optimizer(warmup_steps=1), steps=10)
STEPS = 4
rng = np.random.default_rng(0)
samples = lambda: [random_sample(CONFIG, rng, grids) for grids in (((2, 4),), ((2, 2),))]  # noqa: E731
BATCHES = [tiny_batch(CONFIG, [samples() for _ in range(8)]) for _ in range(STEPS)]


def run(text: str | None) -> dict:
    mesh = None if text is None else make_mesh(text)
    state = init_state(RUN, tiny_params(CONFIG), mesh)
    batches = BATCHES if mesh is None else jax.device_put(BATCHES, batch_sharding(mesh))
    step = train_step.lower(state, batches[0], CONFIG, RUN.optimizer, RUN.steps, mesh).compile()
    losses = []
    for batch in batches:
        state, metrics = step(state, batch, RUN.steps)
        losses.append(float(metrics["loss"]))
    found = {"losses": losses, "summed": 0, "moved": Counter()}
    for c in collectives(step.as_text()):
        if c.kind == "all-reduce":
            found["summed"] += c.times * c.bytes
        else:
            found["moved"][f"{c.kind} {c.shape}"] += c.times
    if mesh is not None:
        found |= weights(mesh)
        stored = jax.tree.map(lambda x, at: x.sharding.is_equivalent_to(at, x.ndim), state.params, param_shardings(CONFIG, mesh))
        found["state_stays_in_place"] = all(jax.tree.leaves(stored))
        held = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
        found |= {"params_per_device": held(state.params), "moments_per_device": held(state.optimizer)}
    return found


def weights(mesh) -> dict:
    """Weights that are stored in parts over fsdp or context: what a step has to gather of them, layer by layer."""
    total, gathered = 0, Counter()
    description = jax.tree.leaves(describe(CONFIG), is_leaf=is_param)
    for param, at in zip(description, jax.tree.leaves(param_shardings(CONFIG, mesh)), strict=True):
        total += 4 * math.prod(param.shape)
        if any(axis in str(at.spec) for axis in STORED):
            whole = [n // mesh.shape["tensor"] if part == "tensor" else n for n, part in zip(param.shape, at.spec, strict=True)]
            layers, whole = (whole[0], [1, *whole[1:]]) if param.axes[0] == "layers" else (1, whole)
            gathered[f"all-gather f32[{','.join(map(str, whole))}]"] += layers
    return {"gathered": gathered, "total_bytes": total}


print(json.dumps({text: run(None if text == "none" else text) for text in sys.argv[1:]}))
