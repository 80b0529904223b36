"""Orbax checkpoints of a run: state and data iterator together, written asynchronously, whole or not at all."""

from pathlib import Path

import grain
import orbax.checkpoint as ocp

from andesvl_jax.errors import UserError


def open_manager(path: Path, keep: int) -> ocp.CheckpointManager:
    """A manager that keeps the newest `keep` checkpoints under `path`."""
    path.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    return ocp.CheckpointManager(path.absolute(), options=options)


def save_checkpoint(manager: ocp.CheckpointManager, step: int, state, data) -> None:
    """Raises UserError when the disk refuses; earlier checkpoints stay."""
    try:
        manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(data))
        )
    except OSError as error:
        raise UserError(
            f"{manager.directory}: checkpoint {step} could not be written ({error}); earlier ones are untouched."
        ) from error


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
