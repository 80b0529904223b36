"""The TPU kernel "splash": in interpret mode equal to plain attention, and picked where it can run."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from tiny import max_relative, tiny_config, xla_flags

from andesvl_jax.cache.kv import empty_cache
from andesvl_jax.errors import UserError
from andesvl_jax.model import attention
from andesvl_jax.model.attention import Part, Place, attend, cache_part, pick
from andesvl_jax.model.devices import compiled_for, target_platform
from andesvl_jax.model.splash import splash

# N, K, H, T, causal, dtype: widths 64, 128 and an odd one; one block, two and three; with and without grouped heads
CASES = [
    (4, 2, 128, 300, True, "float32"), (4, 2, 64, 700, True, "float32"), (1, 1, 80, 1100, False, "float32"),
    (2, 2, 64, 130, False, "bfloat16"),
]  # fmt: skip
# float32: sums in another order. bfloat16: both sides round weights and results to 8 bits
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}


def packed(t: int) -> Place:
    """Two rows of t slots: three segments and padding, one segment."""
    positions = np.full((2, t), -1, np.int32)
    segments = np.full((2, t), -1, np.int32)
    for row, lengths in enumerate(([t // 3, t // 5, t // 4], [t])):
        start = 0
        for number, length in enumerate(lengths):
            segments[row, start : start + length], positions[row, start : start + length] = number, np.arange(length)
            start += length
    return Place(jnp.asarray(positions), jnp.asarray(segments))


@functools.partial(jax.jit, static_argnums=0)
def with_gradient(fn, place: Place, dy, *arrays):
    """fn's values at the tokens that are no padding, and the gradients of its arrays."""
    y, back = jax.vjp(lambda *x: jnp.where((place.segments >= 0)[..., None, None], fn(place, *x), 0), *arrays)
    return y, *back(dy)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_splash_equals_plain_attention_in_values_and_gradients(case):
    n, k, h, t, causal, dtype = case
    rng, wide, narrow = np.random.default_rng(0), (2, t, n, h), (2, k, t, h)
    arrays = [jnp.asarray(rng.normal(size=s), dtype) for s in (wide, wide, narrow, narrow)]
    plain = lambda place, q, k, v: attend(q, [Part(k, v, place, own=True)], place, causal, "einsum", 1)  # noqa: E731
    kernel = lambda place, *qkv: splash(*qkv, place.segments, causal, interpret=True)  # noqa: E731
    expected, found = (with_gradient(fn, packed(t), *arrays) for fn in (plain, kernel))
    for a, b in zip(found, expected, strict=True):
        assert max_relative(a.astype(jnp.float32), b.astype(jnp.float32)) <= TOLERANCE[dtype]


def test_on_a_mesh_each_device_attends_for_its_own_rows_heads_and_tokens():
    """Four query and two kv heads: dealt to two devices, repeated for four; two rows that four devices cannot share; rows in two
    and four parts, which segments cross."""
    script = Path(__file__).with_name("attention_on_four_devices.py")
    flags = {"XLA_FLAGS": xla_flags(4), "PYTHONPATH": str(script.parents[2])}
    meshes = ["data=2,tensor=2", "tensor=4", "data=4", "context=4", "data=2,context=2", "context=2,tensor=2"]
    done = subprocess.run([sys.executable, script, *meshes], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(off <= TOLERANCE["float32"] for off in json.loads(done.stdout.splitlines()[-1]).values()), done.stdout


def on(platform: str):
    """As on a mesh of one device of that platform."""
    device = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device))


def test_the_platform_is_that_of_the_mesh_in_context():
    assert target_platform() == "cpu"
    with on("tpu"):
        assert target_platform() == "tpu"
    with compiled_for(None):
        assert target_platform() == "cpu"
    with compiled_for(jax.make_mesh((1,), ("data",))):
        assert target_platform() == "cpu"


def test_auto_is_splash_on_tpu_and_chunked_elsewhere_or_through_a_cache():
    picked = {}
    for platform in ("cpu", "gpu", "tpu"):
        with on(platform):
            picked[platform] = pick("auto", own=True), pick("auto", own=False), pick("einsum", own=True)
    assert picked["tpu"] == ("splash", "chunked", "einsum")
    assert picked["cpu"] == picked["gpu"] == ("chunked", "chunked", "einsum")


def test_splash_refuses_what_it_cannot_honour():
    config = tiny_config(attention="splash").text
    q, kv, place = jnp.ones((1, 4, 4, 8)), jnp.ones((1, 2, 4, 8)), Place(jnp.arange(4)[None])
    with pytest.raises(UserError, match="attention: found 'splash', a kernel for TPU, on cpu; expected 'auto' or 'chunked'"):
        attend(q, [Part(kv, kv, place, own=True)], place, True, "splash", 256)
    with on("tpu"), pytest.raises(UserError, match="'splash', which reads no cache; expected 'auto' or 'chunked' to decode"):
        attend(q, [cache_part(empty_cache(config, 1, 4, jnp.float32), 0)], place, True, "splash", 256)
    with pytest.raises(ValueError, match="'flash', expected one of"):
        pick("flash", own=True)


def test_tokens_without_segments_see_all_that_is_no_padding(monkeypatch):
    monkeypatch.setattr(attention, "splash", functools.partial(splash, interpret=True))
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 9, 2, 8), (1, 2, 9, 8), (1, 2, 9, 8)))
    place = Place(jnp.where(jnp.arange(9) < 6, 0, -1)[None])
    expected = attend(q, [Part(k, v, place, own=True)], place, False, "einsum", 256)
    with on("tpu"):
        found = attend(q, [Part(k, v, place, own=True)], place, False, "auto", 256)
    assert max_relative(found[:, :6], expected[:, :6]) <= TOLERANCE["float32"]
