"""Generation on a mesh: what `aot` compiles for a slice runs, with the tokens of one device."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import xla_flags

MESHES = {"data=2,fsdp=2,tensor=2": 1 / 8, "fsdp=4,tensor=2": 1 / 8}  # and the share of the cache on a device


@functools.cache
def found() -> dict:
    script = Path(__file__).with_name("generate_on_eight_devices.py")
    flags = {"XLA_FLAGS": xla_flags(8), "PYTHONPATH": str(script.parents[2]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, script, "none", *MESHES]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_generates_the_tokens_of_one_device(mesh):
    """Pictures, unequal rows, greedy and sampled, a second turn after eviction."""
    assert found()[mesh]["answers"] == found()["none"]["answers"]
    assert found()[mesh]["share_of_cache"] == MESHES[mesh]
    assert len({token for row in found()["none"]["answers"][0] for token in row}) > 10  # no constant answer
