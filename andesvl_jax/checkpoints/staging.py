"""Directories that appear whole or not at all: written beside their place, moved there last."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from andesvl_jax.errors import UserError


@contextlib.contextmanager
def replacing(directory: Path, kind: str, marks: tuple[str, ...]) -> Iterator[Path]:
    """A staging directory that becomes `directory` when the block ends well; what stood there before is replaced last.

    Args:
      kind: what is written, for errors ("checkpoint", "export"). marks: files by which an earlier one is known; only such
        a directory or an empty one is replaced.
    Raises:
      UserError: `directory` holds something else, or the disk refuses; what stood there before is then untouched.
    """
    if directory.exists() and not _replaceable(directory, marks):
        raise UserError(
            f"{directory}: exists and is no earlier {kind} ({' or '.join(marks)} is missing), expected a new directory."
        )
    given, directory, staging = directory, directory.resolve(), None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        yield staging
        staging.chmod(0o755)
        _swap(staging, directory)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{given}: the {kind} could not be written ({error}); what was saved there before is untouched."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _replaceable(directory: Path, marks: tuple[str, ...]) -> bool:
    if not directory.is_dir():
        return False
    return all((directory / name).is_file() for name in marks) or not any(directory.iterdir())


def _swap(staging: Path, directory: Path) -> None:
    """Directories cannot be replaced in one step, so the old one is set aside until the new one stands."""
    old = directory.with_name(f".{directory.name}.old")
    if directory.exists():  # else `old` may be all that an interrupted write left
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    try:
        staging.rename(directory)
    except OSError:
        if old.exists():
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)
