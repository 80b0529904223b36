"""A packed batch as files that a person can look at, read back from the arrays that the network is given."""

import itertools
from pathlib import Path

import numpy as np
from PIL import Image

from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.packing import MERGED, Batch
from andesvl_jax.inputs.tokenizer import Tokenizer

NO_PATCH = (255, 0, 255)
_LEGEND = (
    "[[...]] is what the loss is taken on; <picture 0: 9 tokens> are visual tokens of row_N_picture_0.png; each conversation "
    "sees only itself.\n"
)


def show_batch(batch: Batch, folder: Path, tokenizer: Tokenizer, processor: ImageProcessor, rows: int | None = None) -> None:
    """Writes row_0.txt, row_0_picture_0.png and so on for the first `rows` rows (None: all) of a batch of NumPy arrays.

    Which picture a token belongs to, where a patch lies and what is supervised come from the batch's indices alone, so what is
    wrong with them shows. Files of an earlier batch are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("row_*"):
        old.unlink()
    for r in range(len(batch.tokens) if rows is None else min(rows, len(batch.tokens))):
        (folder / f"row_{r}.txt").write_text(row_text(batch, r, tokenizer), encoding="utf-8")
        for number, picture in enumerate(row_pictures(batch, r, processor)):
            Image.fromarray(picture).save(folder / f"row_{r}_picture_{number}.png")


def row_pictures(batch: Batch, row: int, processor: ImageProcessor) -> list[np.ndarray]:
    """The pictures of a row, uint8 [H, W, 3]: patches put where their coordinates say, with the normalisation undone."""
    if batch.images is None:
        return []
    images, side = batch.images, processor.patch_size
    mean, std = np.asarray(processor.mean, np.float32), np.asarray(processor.std, np.float32)
    pictures = []
    for number in range(images.segments[row].max(initial=-1) + 1):
        here = np.flatnonzero(images.segments[row] == number)
        rows, columns = images.grids[row, here[0]]
        canvas = np.full((rows, side, columns, side, 3), NO_PATCH, np.uint8)
        pixels = images.patches[row, here].reshape(-1, 3, side, side).transpose(0, 2, 3, 1) * std + mean
        pixels = np.clip(np.nan_to_num(np.rint(255 * pixels)), 0, 255).astype(np.uint8)
        for (i, j), patch in zip(images.coordinates[row, here], pixels, strict=True):
            canvas[i, :, j] = patch
        pictures.append(canvas.reshape(rows * side, columns * side, 3))
    return pictures


def row_text(batch: Batch, row: int, tokenizer: Tokenizer) -> str:
    """The conversations of a row one after the other, supervised tokens in [[...]], visual tokens by picture and number."""
    slots = batch.target_slots[row][batch.target_slots[row] >= 0]
    tokens, supervised = batch.tokens[row].copy(), np.zeros(len(batch.tokens[row]), bool)
    tokens[slots + 1], supervised[slots + 1] = batch.targets[row][: len(slots)], True
    pictures = np.full(len(tokens), -1)
    visual = batch.visual_index[row] >= 0
    if batch.images is not None:
        pictures[visual] = batch.images.segments[row][MERGED * batch.visual_index[row][visual]]
    used = [f"{np.count_nonzero(x[row] >= 0)} of {x.shape[1]}" for x in (batch.segments, batch.target_slots)]
    lines = [f"row {row}: {used[0]} tokens, {used[1]} targets. {_LEGEND}"]
    for sample in range(batch.segments[row].max(initial=-1) + 1):
        here = np.flatnonzero(batch.segments[row] == sample)
        lines.append(f"\n--- conversation {sample}: {len(here)} tokens\n")
        for (picture, learned), run in itertools.groupby(here, key=lambda t: (pictures[t], supervised[t])):
            run = list(run)
            shown = tokenizer.decode(tokens[run], skip_special=False)
            text = f"<picture {picture}: {len(run)} tokens>" if visual[run[0]] else shown
            lines.append(f"[[{text}]]" if learned else text)
    return "".join(lines)
