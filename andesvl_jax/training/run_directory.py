"""One run per directory: a lock while it is trained in, and the check that a resumed run is the one that began there."""

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from andesvl_jax.checkpoints.json_file import read_json
from andesvl_jax.errors import UserError
from andesvl_jax.training.config import PARTS, TrainConfig

# Fields, with all inside them, that a resumed run may change: how long, how fast and where it trains, not what it is.
MAY_CHANGE = (
    "steps", "log_every", "checkpoint_every", "keep", "mesh", "init_from", "tokenizer", "optimizer", "data.files",
    "data.image_root", "data.max_bad", "workers",
)  # fmt: skip


@contextlib.contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Holds the lock of a run directory. The system lets go of it when the process ends in whatever way.

    Raises:
      UserError: another process holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise UserError(f"{out}: {holder} trains in it, expected one run in it; wait, or give another --out.") from error
        except OSError as error:
            print(f"andesvl: WARNING: {out}: {error.strerror}, so two runs in it would not be noticed.", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def check_same_run(out: Path, config: TrainConfig) -> None:
    """Compares with the record of the run that is resumed; what may change and did is printed. Without a record nothing is said.

    Raises:
      UserError: a field differs that makes another run of it; the first one is named.
    """
    if not (out / "run.json").exists():
        return
    record = read_json(out / "run.json").get("config")
    for name, value in _fields(config):
        now, before = json.loads(json.dumps(value, default=str)), _at(record, name)
        if before is _ABSENT or json.dumps(before) == json.dumps(now):  # as text: the order of a mixture's sources counts
            continue
        may = any(name == field or name.startswith(field + ".") for field in MAY_CHANGE)
        freezes = name in [f"optimizer.{part}" for part in PARTS] and 0 in (before, now)
        if freezes or not may:
            raise UserError(
                f"{out}: holds a run of another configuration: {name} was {before!r:.80} and is now {now!r:.80}; resume it with "
                "the configuration in its run.json, or give another --out."
            )
        print(f"resume: {name} was {before!r:.80} and is now {now!r:.80}")


def _fields(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a dataclass, nested ones taken apart."""
    for field in dataclasses.fields(config):
        value, dotted = getattr(config, field.name), f"{name}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{dotted}.")
        else:
            yield dotted, value


_ABSENT = object()  # a field that the version of the program that wrote the record did not have


def _at(record: Any, name: str) -> Any:
    for key in name.split("."):
        if not isinstance(record, Mapping) or key not in record:
            return _ABSENT
        record = record[key]
    return record
