"""Models to export, and a way to run an export as a stranger would: elsewhere, isolated, with a list of what was imported."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import random_sample, tiny_config, tiny_params

import andesvl_jax as avl
from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.decoding.api import prompt_sample, stream
from andesvl_jax.export.functions import prompt_arrays
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.packing import Sample, assemble_prompts

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "aimv2_a"
STRANGER = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    status = end.code
print(" ".join({name.split(".")[0] for name in sys.modules}))
sys.exit(status)
"""


@pytest.fixture
def tiny_bundle():
    def make(family: str, **changes) -> Bundle:
        config = tiny_config(family, **changes)
        params = tiny_params(config)
        return Bundle(config, params, None, ImageProcessor(config.vision.patch_size), {"eos_token_id": [63]})

    return make


@pytest.fixture
def tiny_sample():
    """A prompt: 8 text tokens around pictures of 8 and 16 patches make 14 tokens."""

    def make(bundle: Bundle, grids=((2, 4), (4, 4))) -> Sample:
        sample = random_sample(bundle.config, np.random.default_rng(3), grids)
        return dataclasses.replace(sample, supervised=np.zeros_like(sample.supervised))

    return make


@pytest.fixture
def greedy():
    """The ordinary decoder's answer, int32 [n]."""

    def decode(bundle: Bundle, sample, new_tokens: int = 12, stop_ids=()):
        *_, answer = stream(bundle, [sample], new_tokens, stop_ids=stop_ids)
        return answer.ids[0].tolist()

    return decode


@pytest.fixture
def stranger(tmp_path):
    """run(directory, sample, *options) -> (ids, names of imported top-level modules), or (None, stderr) for a refusal."""

    def run(directory: Path, sample, *options: str):
        prompt = tmp_path / "prompt.npz"
        np.savez(prompt, **prompt_arrays(assemble_prompts([sample], sample_features(sample))))
        command = [sys.executable, "-I", "-c", STRANGER, str(directory / "run.py"), str(prompt), *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        if done.returncode:
            return None, done.stderr
        answer, modules = done.stdout.splitlines()[-2:]
        return json.loads(answer)["ids"], set(modules.split())

    return run


def sample_features(sample) -> int:
    return sample.images[0].patches.shape[1] if sample.images else 0


@pytest.fixture(scope="session")
def golden():
    """(bundle, prompt, the 16 greedy ids of the independent reference)."""
    arrays = np.load(GOLDEN / "golden.npz")
    bundle = avl.load(GOLDEN, image_token_id=505, max_size=733)
    return bundle, prompt_sample(bundle, arrays["input_ids"], [arrays["image_0"]]), arrays["greedy_ids"].tolist()
