"""What a run leaves behind: metrics.jsonl, TensorBoard events, and run.json with configuration, environment and command."""

import dataclasses
import json
import os
import platform
import resource
import sys
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Collection, Iterator, Sequence, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tensorboardX import SummaryWriter

from andesvl_jax.config import AndesVLConfig
from andesvl_jax.inputs.packing import Batch, fill
from andesvl_jax.model.andesvl import AndesVL
from andesvl_jax.model.flops import PARTS, batch_flops
from andesvl_jax.training.peak import peak_flops

T = TypeVar("T")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


def norms(name: str, tree: AndesVL) -> dict[str, jax.Array]:
    """Euclidean norms, float32 []: {name: of everything, "name/vision", "name/projector", "name/decoder"}."""
    squares = {part: jnp.asarray(optax.tree.norm(getattr(tree, part), squared=True)) for part in PARTS}
    return {name: jnp.sqrt(sum(squares.values()))} | {f"{name}/{part}": jnp.sqrt(square) for part, square in squares.items()}


class Meter:
    """Speed, data wait, padding and memory between two lines of metrics.

    Args:
      trained: parts with a learning rate. devices: those of this process that work; the batches that it sees are its own rows,
        one of `shares` parts that are taken to have as many tokens.
    """

    def __init__(self, config: AndesVLConfig, trained: Collection[str], devices: Sequence[jax.Device], shares: int = 1):
        self._config, self._trained, self._devices, self._shares = config, trained, devices, shares
        self._watcher = ThreadPoolExecutor(1)  # sees when each step ends, while the loop goes on
        self._ended: Future | None = None  # of the step before
        self._start()

    def _start(self) -> None:
        self._since, self._counts = time.perf_counter(), Counter()
        self._draws: list[tuple[float, float, Future | None]] = []

    def draw(self, data: Iterator[T]) -> T:
        """The next element, with a note of how long it took."""
        began = time.perf_counter()
        element = next(data)
        self._draws.append((began, time.perf_counter(), self._ended))
        return element

    def ran(self, batches: Sequence[Batch], result: jax.Array) -> None:
        """Counts a step that was started on micro-batches and will end with `result`."""
        self._ended = self._watcher.submit(_time_when_ready, result)
        self._counts["steps"] += 1
        for batch in batches:
            self._counts["tokens"] += int(np.count_nonzero(batch.segments >= 0))
            self._counts["flops"] += batch_flops(self._config, batch, self._trained)
            self._counts.update({f"padding/{name}": (1 - share) / len(batches) for name, share in fill(batch).items()})

    def line(self) -> dict[str, float]:
        """Once the last step has ended: everything since the last line, which starts anew.

        Returns:
          step_s, seconds of a step, everything included; tokens_per_s, of all processes, without padding; flops_per_s, of the
          products that these tokens and pictures need, and mfu, their share of the devices' peak where that is known;
          data_wait, share of the time in which the devices had no step because its batch was not there; padding/tokens,
          padding/patches, padding/targets, shares of the slots; peak_device_bytes, of the fullest device since the start of
          the process, where devices tell it, otherwise peak_process_bytes.
        """
        counts, seconds = self._counts, time.perf_counter() - self._since
        idle = sum(max(0.0, end - max(began, before.result() if before else began)) for began, end, before in self._draws)
        values = {
            "step_s": seconds / counts["steps"],
            "tokens_per_s": counts["tokens"] * self._shares / seconds,
            "flops_per_s": counts["flops"] * self._shares / seconds,
            "data_wait": idle / seconds,
        }
        peak = peak_flops(self._devices[0].device_kind)
        if peak is not None:
            values["mfu"] = values["flops_per_s"] / (peak * len(self._devices) * jax.process_count())
        values |= {name: total / counts["steps"] for name, total in counts.items() if name.startswith("padding/")}
        self._start()
        return values | peak_memory(self._devices)


def _time_when_ready(result: jax.Array) -> float:
    jax.block_until_ready(result)
    return time.perf_counter()


def peak_memory(devices: Sequence[jax.Device]) -> dict[str, int]:
    """Most bytes in use at once: {"peak_device_bytes"} of the fullest device, or {"peak_process_bytes"} where it is not told."""
    told = [stats["peak_bytes_in_use"] for d in devices if (stats := d.memory_stats()) and "peak_bytes_in_use" in stats]
    if told:
        return {"peak_device_bytes": max(told)}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_process_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def start_trace(folder: Path, after: Any) -> None:
    """Starts JAX's profiler once the arrays `after` are there; without Python's own calls, which would slow the data down."""
    jax.block_until_ready(after)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace(folder, profiler_options=options)


class MetricsWriter:
    """Appends one JSON object a call to metrics.jsonl and the same numbers to TensorBoard; does nothing unless `writes`."""

    def __init__(self, out: Path, writes: bool = True):
        self._lines = open(out / "metrics.jsonl" if writes else os.devnull, "a", encoding="utf-8")
        self._board = SummaryWriter(str(out / "tensorboard"), write_to_disk=writes)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._lines.write(json.dumps({"step": step} | values) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self._lines.close()
        self._board.close()


def read_metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def environment() -> dict[str, Any]:
    """Versions and devices that a reader needs to repeat the run."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "machine": platform.machine(),
    }


def write_run_record(out: Path, config: Any, command: str) -> None:
    record = {"command": command, "environment": environment(), "config": dataclasses.asdict(config)}
    staged = out / "run.json.new"
    staged.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    staged.replace(out / "run.json")  # a full disk leaves the record of before
