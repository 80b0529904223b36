"""Run by test_sharded_leaves.py with eight CPU devices: scores and gradients of a recipe on a mesh and on one device."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import max_relative, random_sample, tiny_batch, tiny_config, tiny_params

from andesvl_jax.model.andesvl import forward
from andesvl_jax.model.decoder import logits
from andesvl_jax.model.devices import compiled_for
from andesvl_jax.training.sharding import batch_sharding, gather, make_mesh, param_shardings
from andesvl_jax.weights import (
    ALL_MATRICES,
    DECODER_MATRICES,
    Adapt,
    Int4,
    Int8,
    Quantize,
    Recipe,
    Rule,
    Simulate,
    Ternary,
    represent,
)

CONFIG = tiny_config(vision={"num_layers": 1}, text={"tie_word_embeddings": False})
TABLES = r"decoder\.(embedding|head)"
RECIPES = {
    "adapted": [Rule(ALL_MATRICES, Adapt(3, 6.0))],
    "packed": [Rule(ALL_MATRICES, Quantize(Int4(8))), Rule(TABLES, Quantize(Int8(), axis=-1))],
    "simulated": [Rule(ALL_MATRICES, Simulate(Int8()))],
    "adapted over packed": [Rule(DECODER_MATRICES, Quantize(Ternary(8))), Rule(DECODER_MATRICES, Adapt(2, 4.0))],
}
rng = np.random.default_rng(0)
SAMPLES = [random_sample(CONFIG, rng, grids) for grids in (((2, 4),), ((2, 2),)) * 4]
BATCH = tiny_batch(CONFIG, [[s] for s in SAMPLES], tokens=32, patches=32)


def changed(params):
    """The tree with adapters that do something."""
    flat = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    names = jax.tree.unflatten(jax.tree.structure(params), [jax.tree_util.keystr(p) for p in flat])
    return jax.tree.map(lambda x, name: x + 0.02 if name.endswith(".b") else x, params, names)


def run(mesh_text: str, rules) -> dict:
    recipe, mesh = Recipe(tuple(rules)), make_mesh(mesh_text)
    params = changed(represent(tiny_params(CONFIG), recipe, jax.random.key(1)))

    def loss(params, batch, mesh):
        if mesh is not None:
            params = gather(params, CONFIG, mesh, recipe)
        with compiled_for(mesh):
            scores = logits(params.decoder, forward(params, CONFIG, batch))
        scores = scores * (batch.positions >= 0)[..., None]
        return jnp.sum(scores * jnp.cos(jnp.arange(scores.size)).reshape(scores.shape)), scores

    both = jax.jit(jax.grad(loss, has_aux=True, allow_int=True), static_argnums=2)
    expected, scores = both(params, BATCH, None)
    stored = param_shardings(CONFIG, mesh, recipe=recipe)
    placed = jax.device_put(params, stored)
    found, sharded_scores = both(placed, jax.device_put(BATCH, batch_sharding(mesh)), mesh)
    floats = [(f, e) for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected)) if e.dtype != jax.dtypes.float0]
    return {
        "scores": max_relative(sharded_scores, scores),
        "gradient": max(max_relative(f, e) for f, e in floats if np.abs(e).max() > 1e-6),
        "bytes": sum(x.nbytes for x in jax.tree.leaves(params)),
        "bytes_per_device": sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed)),
    }


print(json.dumps(run(sys.argv[1], RECIPES[sys.argv[2]])))
