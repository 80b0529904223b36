"""Run by test_splash.py with four CPU devices: how far attention on meshes is from plain attention on one device, as a JSON line.

For each mesh on the command line the largest `max_relative` of values and gradients, of splash and of the other backends.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import max_relative

from andesvl_jax.model.attention import Part, Place, attend
from andesvl_jax.model.devices import HEAD_AXES, ROW_AXES, compiled_for
from andesvl_jax.model.splash import splash
from andesvl_jax.training.sharding import make_mesh
from andesvl_jax.weights import CONTEXT

T = 20
rng = np.random.default_rng(0)
SEGMENTS = jnp.asarray(np.sort(rng.integers(0, 3, (2, T))), jnp.int32)
PLACE = Place(jnp.broadcast_to(jnp.arange(T), (2, T)), SEGMENTS)
ARRAYS = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, T, 4, 8), (2, T, 4, 8), (2, 2, T, 8), (2, 2, T, 8))]
BACKENDS = {
    "splash": lambda causal, *qkv: splash(*qkv, SEGMENTS, causal, interpret=True),
    "einsum": lambda causal, q, k, v: attend(q, [Part(k, v, PLACE, own=True)], PLACE, causal, "einsum", 1),
    "chunked": lambda causal, q, k, v: attend(q, [Part(k, v, PLACE, own=True)], PLACE, causal, "chunked", 3),
}


def with_gradient(fn, causal, dy, *arrays):
    y, back = jax.vjp(lambda *qkv: fn(causal, *qkv), *arrays)
    return y, *back(dy)


def run(text: str, name: str, causal: bool) -> float:
    mesh = make_mesh(text)
    rows, heads = (axes if mesh.shape[axes[0]] <= 2 else None for axes in (ROW_AXES, HEAD_AXES))
    at = [NamedSharding(mesh, P(rows, CONTEXT, HEAD_AXES))] * 2 + [NamedSharding(mesh, P(rows, heads, CONTEXT))] * 2

    def attention(causal, *qkv):
        with compiled_for(mesh):
            return BACKENDS[name](causal, *qkv)

    found = jax.jit(lambda *xs: with_gradient(attention, causal, *xs))(*jax.device_put(ARRAYS, at))
    return max(max_relative(a, b) for a, b in zip(found, EXPECTED[causal], strict=True))


EXPECTED = {causal: with_gradient(BACKENDS["einsum"], causal, *ARRAYS) for causal in (True, False)}
CASES = [("splash", True), ("splash", False), ("einsum", True), ("chunked", True), ("chunked", False)]
print(json.dumps({text: max(run(text, *case) for case in CASES) for text in sys.argv[1:]}))
