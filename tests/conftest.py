"""Test-wide settings: CPU, one persistent compilation cache for all workers, slow tests only on request."""

import gc
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# read by jax when it is first imported, here and in every process that a test or pytest-xdist starts
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


MAPPED = 20_000  # regions of memory; Linux gives a process 65,530, and every compiled program takes a few


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Lets go of compiled programs after a file of tests when they are many: LLVM dies where no region is left."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPED:
        import jax

        jax.clear_caches()
        gc.collect()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow") or config.getoption("-m"):
        return
    slow = [item for item in items if "slow" in item.keywords]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]
