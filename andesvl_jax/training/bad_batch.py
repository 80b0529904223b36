"""What a run keeps when its loss stays non-finite: the batch as a NumPy archive and as pictures, and the parameters.

The archive is read without pickle, and no size in it is believed before it is checked.
"""

import math
import zipfile
from pathlib import Path

import numpy as np

from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.checkpoints.hf import save
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.packing import Batch, ImageRow
from andesvl_jax.training.batch_pictures import show_batch

BAD_BATCH, BAD_PICTURES, BAD_MODEL = "bad_batch.npz", "bad_batch", "bad_model"  # in the run's directory

# dtype and dimensions of every array: B rows, T tokens, M targets, P patches, F features of a patch; two = (row, column)
_TEXT = {
    "tokens": ("int32", "BT"), "positions": ("int32", "BT"), "segments": ("int32", "BT"), "visual_index": ("int32", "BT"),
    "target_slots": ("int32", "BM"), "targets": ("int32", "BM"), "target_weights": ("float32", "BM"),
}  # fmt: skip
_IMAGES = {
    "patches": ("float32", "BPF"), "coordinates": ("int32", "BP2"), "grids": ("int32", "BP2"), "segments": ("int32", "BP"),
}  # fmt: skip


def keep_bad_batch(out: Path, batch: Batch, bundle: Bundle) -> str:
    """Keeps batch (NumPy arrays) and parameters for `training.replay`; returns the part of a sentence that says how to go on."""
    try:
        write_batch(out / BAD_BATCH, batch)
        show_batch(batch, out / BAD_PICTURES, bundle.tokenizer, bundle.image_processor)
        save(bundle, out / BAD_MODEL)
    except OSError as error:
        return f"its batch could not be kept ({error.strerror or error})"
    return (
        f"its batch is kept in {out / BAD_BATCH}: the same command with --replay (without --resume) runs it again and names its "
        "bad rows"
    )


def write_batch(path: Path, batch: Batch) -> None:
    """Arrays under the names of Batch's fields, those of its pictures as "images.patches" and so on."""
    arrays = {name: getattr(batch, name) for name in _TEXT}
    if batch.images is not None:
        arrays |= {f"images.{name}": getattr(batch.images, name) for name in _IMAGES}
    np.savez(path, **arrays)


def read_batch(path: Path) -> Batch:
    """Raises UserError for a file that `write_batch` cannot have written."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; a run writes it when it stops because its loss is not finite.")
    sizes: dict[str, int] = {"2": 2}
    try:
        with zipfile.ZipFile(path) as archive:
            read = lambda prefix, table: {n: _array(archive, prefix + n, *spec, sizes) for n, spec in table.items()}  # noqa: E731
            text = read("", _TEXT)
            pictures = any(name.startswith("images.") for name in archive.namelist())
            return Batch(**text, images=ImageRow(**read("images.", _IMAGES)) if pictures else None)
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path}: is no batch of a training run ({str(error)[:200]}).") from error


def _array(archive: zipfile.ZipFile, name: str, dtype: str, letters: str, sizes: dict[str, int]) -> np.ndarray:
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED:  # what is not compressed cannot be larger than the file
        raise ValueError(f"{name} is compressed, expected it as it is")
    with archive.open(member) as file:
        np.lib.format.read_magic(file)
        shape, _, found = np.lib.format.read_array_header_1_0(file)
        if found != np.dtype(dtype) or math.prod(shape) * found.itemsize != member.file_size - file.tell():
            raise ValueError(f"{name} is {found} {list(shape)} in {member.file_size} bytes, expected {dtype} that fills them")
    if len(shape) != len(letters) or any(sizes.setdefault(c, n) != n for c, n in zip(letters, shape, strict=True)):
        raise ValueError(f"{name} has shape {list(shape)}, expected {letters} with {sizes}")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
