"""What a run leaves behind: metrics.jsonl, TensorBoard events, and run.json with configuration, environment and command."""

import dataclasses
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


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
