"""Where a checkpoint lies: a directory, one that ships with this package, or one of the Hugging Face hub by its id."""

import os
import re
from pathlib import Path

from andesvl_jax.errors import UserError

SMALL, SAFETENSORS, TORCH = ("*.json", "*.txt"), ("model*.safetensors",), ("pytorch_model*.bin",)  # never code

SHIPPED = Path(__file__).resolve().parents[1] / "shipped"


def shipped_directory(model: str | os.PathLike) -> Path | None:
    """The directory of a model that ships ("nano"), unless a directory of that name is in the way; None for another name."""
    path = SHIPPED / str(model)
    ships = re.fullmatch(r"[a-z0-9-]+", str(model)) is not None and path.is_dir() and not Path(model).is_dir()
    return path if ships else None


def shipped_models() -> list[str]:
    return sorted(path.name for path in SHIPPED.glob("*/"))


def local_directory(model: str | os.PathLike, revision: str | None) -> Path:
    """The directory a model lies in: itself, that of a shipped name, or a download of `owner/name` at `revision` (branch, tag
    or commit).

    Raises:
      UserError: neither a directory nor an id, or the hub cannot be reached and nothing of it was downloaded before.
    """
    path = shipped_directory(model) or Path(model)
    if path.is_dir():
        if revision is not None:
            raise UserError(f"{path}: revision is {revision!r} for a directory, expected it with a hub id only.")
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(model)):
        raise UserError(
            f"{path}: no such directory, expected a checkpoint with config.json and model.safetensors, a hub id owner/name, or "
            f"one that ships: {', '.join(shipped_models())}."
        )
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(str(model), revision=revision, allow_patterns=[*SMALL, *SAFETENSORS]))
        if not any(found.glob("*.safetensors")):  # the same commit, so that both downloads fit together
            found = Path(snapshot_download(str(model), revision=found.name, allow_patterns=[*SMALL, *TORCH]))
    except (OSError, ValueError) as error:  # no network, no such repository, no room on the disk
        reason = str(error).strip().splitlines()[0].rstrip(".:") if str(error).strip() else type(error).__name__
        raise UserError(
            f"{model}: no such directory, and not to be had from the Hugging Face hub ({reason}); give a directory, or "
            "download it where there is a network."
        ) from error
    return found
