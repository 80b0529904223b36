"""Orbax checkpoints of a run: state and data iterator together, written asynchronously, whole or not at all."""

import contextlib
import functools
import logging
import os
import re
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Iterator

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from andesvl_jax.data.pipeline import join_states
from andesvl_jax.errors import UserError
from andesvl_jax.training.hosts import from_all, is_first

SETTLE_SECONDS = 10


def open_manager(path: Path, keep: int) -> ocp.CheckpointManager:
    """A manager that keeps the newest `keep` checkpoints under `path` and clears away what broken saves left."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)
    path.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(path.absolute(), options=options)


def _is_news(record: logging.LogRecord) -> bool:
    """False for the tracebacks of Orbax's writer threads and tasks; `wait_until_finished` raises the same errors here."""
    return not (record.pathname.endswith("futures/future.py") or "exception was never retrieved" in str(record.msg))


def save_checkpoint(manager: ocp.CheckpointManager, step: int, state, data) -> None:
    """Starts to save; waits for the save before. Raises UserError when the disk refuses either; earlier checkpoints stay.

    `data` is this process's iterator; what is saved is the joined state of all, which any number of processes can start from.
    Of the frozen parameters only a checksum is saved: they come from where the run took them.
    """
    state, frozen = state.replace(frozen=None), state.frozen
    place = {"data": join_states(from_all(data.get_state())), "sum": _sum_of(state), "frozen": _sum_of(frozen)}
    with _clear_disk_errors(manager):
        manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), place=ocp.args.JsonSave(place)))


@jax.jit
def _bit_sum(state) -> jax.Array:
    """Sum of all bit patterns modulo 2^32, each array's times an odd number of its own: exact on any mesh."""
    words = lambda x: jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)  # noqa: E731
    sums = [jnp.sum(words(x), dtype=jnp.uint32) * jnp.uint32(2 * i + 1) for i, x in enumerate(jax.tree.leaves(state))]
    return functools.reduce(jnp.add, sums, jnp.uint32(0))


def _sum_of(state) -> int:
    return int(_bit_sum(state))


def finish_checkpoints(manager: ocp.CheckpointManager) -> None:
    """Waits until the last checkpoint is on disk. Raises UserError when the disk refuses it; earlier checkpoints stay."""
    with _clear_disk_errors(manager):
        manager.wait_until_finished()
    manager.close()


def settle(manager: ocp.CheckpointManager) -> None:
    """After an error elsewhere, lets a save that has begun come to its end.

    Among several processes not for ever: it needs them all, and one may be stuck in a step that waits for this process.
    """

    def wait() -> None:
        with contextlib.suppress(Exception):  # the error at hand says what is wrong
            manager.wait_until_finished()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(None if jax.process_count() == 1 else SETTLE_SECONDS)


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


def restore_latest(manager: ocp.CheckpointManager, state, frozen, data):
    """The newest whole checkpoint in the shapes and places of `state`, which may be abstract, with the frozen parameters of the
    run; `data` is set to its place in it.

    A checkpoint that cannot be read, on any process, or whose numbers are not those that were saved, is moved out of the way
    with a warning, and the one before it is taken.

    Raises:
      UserError: no checkpoint, or none that fits the configuration and can be read.
    """
    broken: dict[int, str] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        restored, reason = _restored(manager.directory / str(step), state.replace(frozen=None))
        if reason is None:
            if restored["place"].get("frozen", 0) != _sum_of(frozen):
                raise UserError(
                    f"{manager.directory}/{step}: was trained over other frozen weights than init_from gives now; give the base "
                    "that the run began with."
                )
            if broken and is_first():
                _move_away(Path(manager.directory), broken, step)
            from_all(None)  # nobody reads the directory anew before that
            manager.reload()
            data.set_state(restored["place"]["data"])
            return restored["state"].replace(frozen=frozen)
        broken[step] = reason
    if not broken:
        raise UserError(f"{manager.directory}: holds no checkpoint to resume from; start without --resume.")
    step, reason = next(iter(broken.items()))
    raise UserError(f"{manager.directory}/{step}: cannot be restored into this configuration ({reason}).")


def _restored(path: Path, state) -> tuple[Any, str | None]:
    """What a checkpoint holds, and None or what is wrong with it on some process; all processes get the same answer."""
    alone = ocp.options.MultiprocessingOptions(  # a process that fails would leave the others waiting in Orbax
        primary_host=None, active_processes={jax.process_index()}, barrier_sync_key_prefix=f"restore{jax.process_index()}"
    )
    items = ocp.args.Composite(state=ocp.args.StandardRestore(state), place=ocp.args.JsonRestore())
    restored, reason = None, None
    try:
        handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            restored = reader.restore(path, args=items)
    except Exception as error:  # whatever Orbax and its readers raise of a broken file
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    reason = next((found for found in from_all(reason) if found is not None), None)
    if reason is None and _sum_of(restored["state"]) != restored["place"]["sum"]:
        reason = "its numbers are not those that were saved"
    return restored, reason


def _move_away(directory: Path, broken: dict[int, str], taken: int) -> None:
    aside = directory.with_name("broken_checkpoints")
    aside.mkdir(exist_ok=True)
    for step, reason in broken.items():
        target = Path(tempfile.mkdtemp(prefix=f"{step}.", dir=aside))
        (directory / str(step)).rename(target)
        print(
            f"andesvl: WARNING: checkpoint {directory / str(step)} is broken ({reason}); it was moved to {target}, and the run "
            f"goes on from step {taken}.", file=sys.stderr, flush=True,
        )  # fmt: skip
