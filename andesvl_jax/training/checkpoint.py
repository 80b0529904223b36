"""Orbax checkpoints of a run: state and data iterator together, written asynchronously, whole or not at all."""

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Iterator

import grain
import orbax.checkpoint as ocp

from andesvl_jax.errors import UserError


def open_manager(path: Path, keep: int) -> ocp.CheckpointManager:
    """A manager that keeps the newest `keep` checkpoints under `path` and clears away what broken saves left."""
    logging.getLogger("absl").addFilter(_is_news)
    path.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(path.absolute(), options=options)


def _is_news(record: logging.LogRecord) -> bool:
    """False for the tracebacks that Orbax's writer threads log; `wait_until_finished` raises the same errors here."""
    return not record.pathname.endswith("futures/future.py")


def save_checkpoint(manager: ocp.CheckpointManager, step: int, state, data) -> None:
    """Starts to save; waits for the save before. Raises UserError when the disk refuses either; earlier checkpoints stay."""
    with _clear_disk_errors(manager):
        manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(data))
        )


def finish_checkpoints(manager: ocp.CheckpointManager) -> None:
    """Waits until the last checkpoint is on disk. Raises UserError when the disk refuses it; earlier checkpoints stay."""
    with _clear_disk_errors(manager):
        manager.wait_until_finished()
    manager.close()


@contextlib.contextmanager
def _clear_disk_errors(manager: ocp.CheckpointManager) -> Iterator[None]:
    """What the disk refused as one UserError; Orbax's writers say it as a ValueError with the system's number in its text."""
    try:
        yield
    except (OSError, ValueError) as error:
        number = re.search(r"os_error_code='(\d+)'", str(error))
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif number:
            reason = os.strerror(int(number[1]))
        else:
            raise
        newest = manager.latest_step()
        kept = "there is none before it" if newest is None else f"make room and --resume from step {newest}, which is whole"
        raise UserError(f"{manager.directory}: a checkpoint could not be written ({reason}); {kept}.") from error


def restore_latest(manager: ocp.CheckpointManager, state, data):
    """The newest checkpoint in the shapes of `state`; `data` is set to its place in it.

    Raises:
      UserError: no checkpoint, or one that does not fit the configuration or cannot be read.
    """
    step = manager.latest_step()
    if step is None:
        raise UserError(f"{manager.directory}: holds no checkpoint to resume from; start without --resume.")
    try:
        restored = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state), data=grain.checkpoint.CheckpointRestore(data))
        )
    except (ValueError, KeyError, OSError, FileNotFoundError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{manager.directory}/{step}: cannot be restored into this configuration ({reason}).") from error
    return restored["state"]
