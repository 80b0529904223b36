"""How the C++ kernels are built and registered."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from andesvl_jax.kernels import cpu

needs_kernel = pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """`cpu.available` as in a new process, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "TARGETS", {})  # XLA takes each name once
    return cpu._registered.__wrapped__


@needs_kernel
def test_it_is_built_once(fresh, tmp_path, monkeypatch):
    assert fresh()
    (library,) = (tmp_path / "andesvl_jax").iterdir()
    assert library.name.startswith("kernel-") and (tmp_path / "andesvl_jax").stat().st_mode & 0o077 == 0
    built = library.stat().st_mtime_ns
    assert fresh() and library.stat().st_mtime_ns == built
    monkeypatch.setattr(cpu, "FLAGS", (*cpu.FLAGS, "-DOTHER"))
    assert cpu._built() != library


def test_without_a_compiler_decoding_warns_and_goes_on(fresh, monkeypatch):
    monkeypatch.setattr(cpu.shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler.*install"):
        assert not fresh()


@needs_kernel
def test_a_failed_build_warns_with_the_compilers_reason(fresh, monkeypatch, tmp_path):
    broken = tmp_path / "broken.cc"
    broken.write_text("int main( {")
    monkeypatch.setattr(cpu, "SOURCE", broken)
    with pytest.warns(UserWarning, match="error"):
        assert not fresh()
    assert not list((tmp_path / "andesvl_jax").iterdir())


@needs_kernel
def test_a_cache_that_others_may_write_to_is_not_trusted(fresh, tmp_path):
    directory = tmp_path / "andesvl_jax"
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.warns(UserWarning, match="only its user"):
        assert not fresh()
    directory.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.symlink(elsewhere, directory)
    with pytest.warns(UserWarning, match="only its user"):
        assert not fresh()
    assert not list(elsewhere.iterdir())


def test_nothing_under_trace_asks_for_the_kernels():
    with pytest.raises(RuntimeError, match="while a function is traced"):
        jax.jit(lambda x: x if cpu.available() else -x)(jnp.ones(2))


@needs_kernel
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_rows_are_written_into_their_slots_and_no_others(dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 100, (2, 1, 3, 5, 4)), dtype)
    rows = -jnp.ones((2, 1, 3, 2, 4)).astype(dtype)
    slots = np.array([[[[4, -1], [0, 2], [5, 1]]], [[[99, -7], [3, 3], [-1, -1]]]], np.int32)  # outside: skipped
    expected = np.array(x)
    for at, slot in np.ndenumerate(slots):
        if 0 <= slot < 5:
            expected[(*at[:3], slot)] = -1
    marks = jnp.zeros((2, 1, 3, 5), jnp.int32)
    found, marked = jax.jit(cpu.write_slots)([x, marks], [rows, jnp.ones_like(slots)], slots)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(marked, (expected < 0).any(-1))
