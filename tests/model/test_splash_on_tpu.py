"""Splash in programs compiled for TPU slices that are not attached; skipped without `libtpu`."""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import random_sample, tiny_batch, tiny_config

from andesvl_jax.model.attention import Part, Place, attend
from andesvl_jax.model.devices import HEAD_AXES, ROW_AXES, compiled_for
from andesvl_jax.training.collectives import by_kind, collectives
from andesvl_jax.training.config import Optimizer, TrainConfig
from andesvl_jax.training.sharding import batch_sharding, make_mesh
from andesvl_jax.training.step import init_state, state_shardings, train_step

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
TOPOLOGIES = ("v5e:2x2", "v6e:2x2")
CALL = 'custom_call_target="tpu_custom_call"'


@pytest.fixture(autouse=True)
def no_cache_of_programs():
    """A program for a device that is not attached cannot be read back."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@functools.cache
def mesh_on(topology: str, text: str):
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # ask no metadata server which machine this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return make_mesh(text, topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def compiled(mesh, n: int, k: int, h: int, t: int, causal: bool, backend: str = "auto", rows: int = 4):
    """The gradient of attention in bfloat16, rows over data and fsdp, heads over tensor."""

    def loss(q, k, v, positions, segments):
        place = Place(positions, segments)
        return attend(q, [Part(k, v, place, own=True)], place, causal, backend, 256).astype(jnp.float32).sum()

    def gradient(*xs):
        with compiled_for(mesh):
            return jax.grad(loss, (0, 1, 2))(*xs)

    at = lambda *spec: NamedSharding(mesh, P(*spec))  # noqa: E731
    cut = HEAD_AXES if k % mesh.shape["tensor"] == 0 else None
    wide, narrow, row = at(ROW_AXES, None, HEAD_AXES), at(ROW_AXES, cut), at(ROW_AXES)
    array = lambda shape, at, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=at)  # noqa: E731
    keys, slots = array((rows, k, t, h), narrow), array((rows, t), row, jnp.int32)
    q = array((rows, t, n, h), wide)
    return jax.jit(gradient, out_shardings=(wide, narrow, narrow)).lower(q, keys, keys, slots, slots).compile()


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("shape", [(16, 8, 128, 4096, True), (12, 12, 64, 4000, False), (4, 2, 32, 60, True)], ids=str)
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2", "fsdp=2,tensor=2"])
def test_splash_compiles_for_tpu_without_collectives(topology, shape, mesh):
    program = compiled(mesh_on(topology, mesh), *shape)
    text = program.as_text()
    assert text.count(CALL) == 3, "forward, gradient of the queries, gradient of keys and values"
    assert collectives(text) == []
    if (t := shape[3]) > 1000:
        assert program.memory_analysis().temp_size_in_bytes < 4 * t * t, "less than the scores of one head of one row"


def test_kv_heads_that_do_not_divide_cost_what_they_cost_without_splash():
    mesh = mesh_on("v5e:2x2", "tensor=4")
    found = {b: by_kind(collectives(compiled(mesh, 8, 2, 128, 512, True, b).as_text())) for b in ("auto", "chunked")}
    assert found["auto"] == found["chunked"]


@pytest.mark.parametrize(
    "text", ["fsdp=2,tensor=2", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("fsdp=4", "fsdp=2,context=2"))]
)
def test_a_train_step_compiles_for_tpu_and_says_no_more_than_without_splash(text):
    mesh = mesh_on("v5e:2x2", text)
    found = {}
    for backend in ("auto", "chunked"):
        config = tiny_config(attention=backend, dtype="bfloat16", remat="layer")
        run = TrainConfig(model=config, optimizer=Optimizer(), steps=100)
        sample = random_sample(config, np.random.default_rng(0), ((6, 8),))
        batch = tiny_batch(config, [[sample]] * 4, tokens=256, patches=256)
        place = lambda tree, at: jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, at)  # noqa: E731
        state = place(jax.eval_shape(functools.partial(init_state, run)), state_shardings(config, run.optimizer, mesh))
        batch = place(batch, jax.tree.map(lambda _: batch_sharding(mesh), batch))
        program = train_step.lower(state, batch, config, run.optimizer, 10, mesh).compile().as_text()
        found[backend] = by_kind(collectives(program))
        # forward, once more in the backward pass (remat), and two gradients: in the encoder's loop and in the decoder's
        assert program.count(CALL) == (8 if backend == "auto" else 0)
    assert set(found["auto"]) == set(found["chunked"])
    for kind, most in found["chunked"].items():
        assert found["auto"][kind]["count"] <= most["count"] and found["auto"][kind]["bytes"] <= most["bytes"], found
