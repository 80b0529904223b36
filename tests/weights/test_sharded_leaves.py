"""Every representation on a mesh of eight devices: the scores and gradients of one device, in a share of its memory."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import xla_flags

MESH = "fsdp=2,context=2,tensor=2"


@functools.cache
def found(recipe: str) -> dict:
    script = Path(__file__).with_name("leaves_on_eight_devices.py")
    flags = {"XLA_FLAGS": xla_flags(8), "PYTHONPATH": str(script.parents[2]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, script, MESH, recipe], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


SLOW = ("adapted", "packed")  # together they are the last of the others
RECIPES = ["simulated", "adapted over packed", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_mesh_computes_what_one_device_does(recipe):
    result = found(recipe)
    assert result["scores"] <= 2e-5  # the same float32 numbers summed in another order
    assert result["gradient"] <= 1e-4  # sums of hundreds of products that partly cancel
    assert result["bytes_per_device"] < 0.5 * result["bytes"]
