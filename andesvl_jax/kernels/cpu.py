"""Binding of `cpu.cc`, which is built once for this machine and registered with XLA.

The kernels have no gradient and are never exported. `available` is called before anything is
traced; traced code reads the answer from a static field: `Streamed.compiled` of a weight,
`Cache.compiled` of a KV cache.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib

SOURCE = Path(__file__).with_name("cpu.cc")
TARGETS = {
    "andesvl_few_rows": "AndesvlFewRows",
    "andesvl_few_queries": "AndesvlFewQueries",
    "andesvl_rows_of": "AndesvlRowsOf",
    "andesvl_widened": "AndesvlWidened",
    "andesvl_write_slots": "AndesvlWriteSlots",
}
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread")
BUILD_LIMIT_S = 120
WIDTH = 16  # numbers that the kernel takes at a time


def available() -> bool:
    """Whether XLA on CPU has the kernels; the first call builds them, or warns once with the reason.

    Raises:
      RuntimeError: called while a function is traced, where a build would hide and the answer could
        differ between traces.
    """
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        raise RuntimeError("kernels.cpu.available() is called while a function is traced, expected before.")
    return _registered()


@functools.cache
def _registered() -> bool:
    try:
        library = ctypes.CDLL(str(_built()))
    except OSError as error:
        warnings.warn(
            f"decoding without the compiled kernel, at half its speed or less ({error}): install a C++ compiler (c++) and see "
            "that ~/.cache belongs to you alone.",
            stacklevel=3,
        )
        return False
    for target, symbol in TARGETS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(library[symbol]), platform="cpu")
    return True


def few_rows(x: jax.Array, w: jax.Array) -> jax.Array:
    """float32 [r, i] times the transpose of float32 or bfloat16 [o, i] -> float32 [r, o]."""
    return jax.ffi.ffi_call("andesvl_few_rows", jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), x.dtype))(x, w)


def rows_of(ids: jax.Array, table: jax.Array) -> jax.Array:
    """Rows of a bfloat16 table [E, D] at int32 ids [n], clipped to 0..E-1 -> float32 [n, D]."""
    out = jax.ShapeDtypeStruct((ids.shape[0], table.shape[1]), jax.numpy.finfo("float32").dtype)
    return jax.ffi.ffi_call("andesvl_rows_of", out)(ids, table)


def widened(w: jax.Array, after: jax.Array) -> jax.Array:
    """bfloat16 [o, i] -> float32 [o, i], made once `after` is there and not before."""
    return jax.ffi.ffi_call("andesvl_widened", jax.ShapeDtypeStruct(w.shape, jax.numpy.finfo("float32").dtype))(w, after)


def few_queries(
    q,
    keys,
    values,
    slots,
    positions,
    layer,
    own_keys,
    own_values,
    mask=None,
    key_scales=None,
    value_scales=None,
) -> jax.Array:
    """Attention of a few queries to one layer of a KV cache and to their own tokens.

    A query sees the cached slots and the own tokens whose position is at most its own.

    Args:
      q: float32 [B, T, N, H], H a multiple of WIDTH.
      keys, values: float32, bfloat16 or int8 [L, B, K, C, H].
      slots: int32 [L, B, K, C], position of each slot, -1 = empty.
      positions: int32 [B, T], position of each query and own token, -1 = padding.
      layer: int32 [], the layer of the cache.
      own_keys, own_values: float32 [B, K, T, H].
      mask: bool [B, T, T], which own tokens a query may see besides, or None: all.
      key_scales, value_scales: float32 [L, B, K, C], scales of int8 keys and values, else None.
    Returns:
      float32 [B, T, N, H]; 0 for a query that sees nothing.
    """
    mask = jnp.zeros((0, 0, 0), bool) if mask is None else mask
    scales = [jnp.zeros(0, q.dtype) if x is None else x for x in (key_scales, value_scales)]
    return jax.ffi.ffi_call("andesvl_few_queries", jax.ShapeDtypeStruct(q.shape, q.dtype))(
        q, keys, values, slots, positions, layer, own_keys, own_values, mask, *scales
    )


def write_slots(arrays: list[jax.Array], rows: list[jax.Array], slots: jax.Array) -> list[jax.Array]:
    """Arrays [L, B, K, C, ...] with their rows [L, B, K, T, ...] at slots int32 [L, B, K, T].

    A slot outside 0..C-1 is skipped. Writes in place where XLA owns an array: donated, or carried by
    a loop.
    """
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    aliases = {1 + i: i for i in range(len(arrays))}
    return jax.ffi.ffi_call("andesvl_write_slots", out, input_output_aliases=aliases)(slots, *arrays, *rows)


def _built() -> Path:
    """The shared library for this source, compiler, jaxlib and processor. Raises OSError when there can be none."""
    compiler = shutil.which("c++")
    if compiler is None:
        raise OSError("no C++ compiler")
    made_of = [
        SOURCE.read_text(),
        *FLAGS,
        jaxlib.__version__,
        _run([compiler, "--version"]),
        _processor(),
    ]
    library = _own_directory() / f"kernel-{hashlib.sha256('|'.join(made_of).encode()).hexdigest()[:32]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = Path(scratch) / library.name
            _run([compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(made)])
            os.replace(made, library)  # whole or not at all, also when two processes build at once
    return library


def _own_directory() -> Path:
    """The cache directory. Libraries are loaded from it, so it must be this user's and nobody else may write to it."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "andesvl_jax"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"{directory} is not a directory that only its user can write to")
    return directory


def _processor() -> str:
    """What -march=native means here: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform()
    return "|".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=BUILD_LIMIT_S).stdout
    except subprocess.CalledProcessError as error:
        reason = next(
            (line for line in error.stderr.splitlines() if "error" in line),
            f"status {error.returncode}",
        )
        raise OSError(f"{command[0]}: {reason}") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} did not end in {BUILD_LIMIT_S} s") from error
