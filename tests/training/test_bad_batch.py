"""A batch as a person sees it, and the batch that stopped a run: kept, read back from a hostile file, and run again."""

import dataclasses
import io
import itertools
import json
import math
import pickle
import re
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import random_sample, tiny_batch, tiny_config

import andesvl_jax as avl
from andesvl_jax.cli import main
from andesvl_jax.data.pipeline import samples_of
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.packing import Budget, assemble
from andesvl_jax.inputs.tokenizer import Tokenizer
from andesvl_jax.training import bad_batch
from andesvl_jax.training import config as config_lib
from andesvl_jax.training import loop as loop_lib
from andesvl_jax.training.bad_batch import BAD_BATCH, BAD_MODEL, BAD_PICTURES, read_batch, write_batch
from andesvl_jax.training.batch_pictures import row_pictures, row_text, show_batch
from andesvl_jax.training.loop import SHOWN_ROWS, train
from andesvl_jax.training.metrics import read_metrics


def packed(tiny_run, rows=2, each=2):
    tokenizer = Tokenizer.load(tiny_run.tokenizer)
    processor = ImageProcessor.from_hf({"min_tokens": tiny_run.min_tokens}, tiny_run.model.vision)
    source = samples_of(tiny_run.data, tokenizer, processor)
    samples = [[source[r * each + i] for i in range(each)] for r in range(rows)]
    budget = Budget(rows, 512, 512, 256)
    return samples, assemble(samples, budget, tiny_run.model.vision.patch_features), tokenizer, processor


def assert_same_batch(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_pictures_of_a_batch_are_the_canvases_to_the_pixel(tiny_run):
    samples, batch, _, processor = packed(tiny_run)
    for r, row in enumerate(samples):
        canvases = [image.canvas for sample in row for image in sample.images]
        for found, canvas in zip(row_pictures(batch, r, processor), canvases, strict=True):
            np.testing.assert_array_equal(found, canvas)
    first = np.flatnonzero(batch.images.segments[0] == 0)
    batch.images.coordinates[0, first[0]] = batch.images.coordinates[0, first[1]]  # an index that is wrong
    assert (row_pictures(batch, 0, processor)[0] == (255, 0, 255)).all(-1).any(), "shows as a hole"


def test_the_text_of_a_row_says_what_is_learned_and_which_picture_is_meant(tiny_run):
    samples, batch, tokenizer, _ = packed(tiny_run)
    for r, row in enumerate(samples):
        text, pictures = row_text(batch, r, tokenizer), 0
        assert text.count("--- conversation") == len(row)
        learned = [tokenizer.decode(sample.tokens[sample.supervised], skip_special=False) for sample in row]
        assert "".join(re.findall(r"\[\[(.+?)\]\]", text.partition("\n")[2])) == "".join(learned)
        for sample in row:
            for image in sample.images:
                assert f"<picture {pictures}: {image.visual_tokens} tokens>" in text
                pictures += 1
        batch.visual_index[r][batch.visual_index[r] >= 0] = 0  # every visual token points at the first picture
        assert text != row_text(batch, r, tokenizer)


def test_text_only_and_empty_rows_are_shown_too(tiny_run, tmp_path):
    _, _, tokenizer, processor = packed(tiny_run)
    config, rng = tiny_config(), np.random.default_rng(0)
    batch = assemble([[random_sample(config, rng, ())], []], Budget(2, 48, 0, 24), config.vision.patch_features)
    (tmp_path / "row_7.txt").write_text("of an earlier batch")
    show_batch(batch, tmp_path, tokenizer, processor)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["row_0.txt", "row_1.txt"]


def test_a_run_shows_its_first_batch(tiny_run, tmp_path):
    config = dataclasses.replace(tiny_run, steps=3, checkpoint_every=3)
    train(config, tmp_path / "run")
    folder = tmp_path / "run" / "first_batch"
    texts = sorted(folder.glob("*.txt"))
    assert len(texts) == min(SHOWN_ROWS, config.budget.rows)
    pictures = [p for p in folder.glob("*.png")]
    assert pictures and all(f"<picture {p.stem.split('_')[-1]}: " in (folder / f"{p.name[:5]}.txt").read_text() for p in pictures)
    with Image.open(pictures[0]) as picture:
        assert picture.mode == "RGB" and min(picture.size) >= config.model.vision.base


def test_a_kept_batch_is_read_back_bitwise(tmp_path):
    config, rng = tiny_config(), np.random.default_rng(0)
    batch = tiny_batch(config, [[random_sample(config, rng)], [random_sample(config, rng)]])
    batch.images.patches[0, 0, 0] = np.nan
    for kept in (batch, batch.replace(images=None)):
        write_batch(tmp_path / "b.npz", kept)
        assert_same_batch(read_batch(tmp_path / "b.npz"), kept)


def huge_header(shape=(1 << 40, 4)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": shape})
    return file.getvalue()


def pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "compression", "message"),
    [
        ("tokens", huge_header(), zipfile.ZIP_STORED, "expected int32 that fills them"),
        ("tokens", pickled(), zipfile.ZIP_STORED, "is object"),
        ("tokens", pickle.dumps(1), zipfile.ZIP_STORED, "magic string"),
        ("tokens", b"", zipfile.ZIP_STORED, "magic string|EOF"),
        ("positions", b"\0" * (1 << 20), zipfile.ZIP_DEFLATED, "positions is compressed"),
        ("targets", None, zipfile.ZIP_STORED, "targets.npy"),
        ("images.patches", huge_header((2, 4)) + bytes(32), zipfile.ZIP_STORED, "images.patches is int32"),
        ("segments", huge_header((2, 4)) + bytes(32), zipfile.ZIP_STORED, r"segments has shape \[2, 4\], expected BT"),
    ],
)
def test_a_hostile_file_is_refused_before_anything_large_is_made(tmp_path, name, content, compression, message):
    config, rng = tiny_config(), np.random.default_rng(0)
    write_batch(tmp_path / "good.npz", tiny_batch(config, [[random_sample(config, rng)]]))
    with zipfile.ZipFile(tmp_path / "good.npz") as good, zipfile.ZipFile(tmp_path / "bad.npz", "w") as bad:
        for member in good.namelist():
            if member != f"{name}.npy":
                bad.writestr(member, good.read(member))
        if content is not None:
            bad.writestr(f"{name}.npy", content, compression)
    with pytest.raises(UserError, match=f"bad.npz: is no batch of a training run .*({message})"):
        read_batch(tmp_path / "bad.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK not a zip")
    with pytest.raises(UserError, match="is no batch"):
        read_batch(tmp_path / "bad.npz")


@pytest.mark.parametrize("mesh", [None, "data=-1"])
def test_a_run_that_stays_non_finite_keeps_the_batch_and_the_replay_finds_it_so(tiny_run, tmp_path, monkeypatch, capsys, mesh):
    """One row of two is poisoned from step 3 on; the replay has the loss of the stop and names that row."""
    real, bad_row = loop_lib.batches, 1

    def poisoned(*args):
        steps = itertools.count(1)

        def poison(batch):
            if next(steps) >= 3:
                batch.images.patches[bad_row, 0] = np.inf
            return batch

        return real(*args).map(poison)

    monkeypatch.setattr(loop_lib, "batches", poisoned)
    config = dataclasses.replace(tiny_run, steps=20, checkpoint_every=20, mesh=mesh)
    monkeypatch.setattr(config_lib, "load_config", lambda *_: config)
    out = tmp_path / "run"
    command = ["train", "--config", "tiny.py", "--out", str(out)]
    assert main([*command, "--replay"]) == 2 and "no such file" in capsys.readouterr().err
    assert main(command) == 2
    said = capsys.readouterr().err
    for mention in ("step 7: the loss or gradient was not finite in 5 steps in a row", BAD_BATCH, "--replay", "start anew"):
        assert mention in said
    assert (out / BAD_PICTURES / "row_1_picture_0.png").is_file()

    assert main([*command, "--replay", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = read_metrics(out)[-1]["loss"]
    assert not math.isfinite(last)
    np.testing.assert_equal(found["loss"], last)
    assert found["rows"] == [bad_row] and "vision.patch" in found["gradients"]

    other = dataclasses.replace(config, model=config.model.replace(text=dataclasses.replace(config.model.text, num_layers=1)))
    monkeypatch.setattr(config_lib, "load_config", lambda *_: other)
    assert main([*command, "--replay"]) == 2 and "another network than the configuration" in capsys.readouterr().err
    assert avl.load(out / BAD_MODEL).config.text.num_layers == config.model.text.num_layers


def test_a_disk_that_refuses_the_batch_does_not_hide_why_the_run_stopped(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bad_batch, "write_batch", full)
    said = bad_batch.keep_bad_batch(tmp_path, None, None)
    assert said == "its batch could not be kept (No space left on device)"
