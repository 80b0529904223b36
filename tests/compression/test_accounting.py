"""`andesvl info`: exact counts for every size from headers alone, and the visual tokens that a picture will really take."""

import json
import math
import resource

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config, tiny_params

import andesvl_jax as avl
from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.checkpoints.locate import SHIPPED, shipped_models
from andesvl_jax.checkpoints.names import hf_shapes
from andesvl_jax.cli import main
from andesvl_jax.compression.accounting import bits_per_weight, describe_checkpoint, tree_bytes
from andesvl_jax.config import CONFIGS, to_hf
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.image import ImageProcessor, prepare_image


@pytest.fixture(scope="module")
def sparse_4b(tmp_path_factory):
    """The 4B checkpoint in bfloat16 with a true header and a hole of 9.5 GB where the tensors would be."""
    path = tmp_path_factory.mktemp("4b")
    config, end, header = CONFIGS["andesvl-4b"].replace(param_dtype="bfloat16"), 0, {}
    for name, shape in hf_shapes(config).items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + 2 * math.prod(shape)]}
    text = json.dumps(header).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (path / "config.json").write_text(json.dumps(to_hf(config)))
    return path


def test_a_4b_directory_is_described_without_its_tensors(sparse_4b):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = describe_checkpoint(str(sparse_4b), sizes=[(1280, 720)])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000  # kilobytes: tensors that were read, mapped or not, would be 9,500,000
    assert result["parameters"] == {
        "vision": 309_984_256, "projector": 27_269_632, "decoder": 4_022_468_096, "embedding": 388_956_160,
        "total": 4_359_721_984,
    }  # fmt: skip
    twice = result["parameters"]["embedding"]  # the tied head is stored a second time
    assert result["bytes"]["total"] == 2 * (4_359_721_984 + twice)
    assert result["bytes"]["vision"] == 2 * 309_984_256 and result["bpw"]["vision"] == 16 and result["bpw_body"] == 16
    assert result["bytes_on_disk"] == (sparse_4b / "model.safetensors").stat().st_size > result["bytes"]["total"]
    assert result["kv_bytes_per_1000_tokens"]["bfloat16"] == 1000 * result["kv_bytes_per_token"] == 1000 * 2 * 36 * 8 * 128 * 2
    tokens = result["pictures"][0]["visual_tokens"]
    assert result["pictures"][0]["kv_bytes"] == tokens * result["kv_bytes_per_token"]


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(shipped_models())))
def test_a_bare_name_gives_the_bytes_of_a_loaded_model(name):
    result = describe_checkpoint(name)
    total = result["parameters"]["total"]
    assert result["bytes_in_memory"] == {"float32": 4 * total, "bfloat16": 2 * total}
    assert result["bytes"] is None and result["bpw_all"] is None
    assert sum(result["parameters"][part] for part in ("vision", "projector", "decoder")) == total


def test_a_name_that_ships_gives_what_lies_in_its_directory():
    assert (
        describe_checkpoint("nano") == describe_checkpoint(str(SHIPPED / "nano")) and describe_checkpoint("nano")["bpw_all"] < 17
    )


def test_what_is_said_of_a_directory_is_what_load_makes_of_it(tmp_path):
    config = tiny_config("siglip2")
    bundle = Bundle(config, tiny_params(config), None, ImageProcessor(config.vision.patch_size))
    avl.save(bundle, tmp_path / "model")
    result = describe_checkpoint(str(tmp_path / "model"))
    assert result["bytes"]["total"] == result["bytes_in_memory"]["float32"] == tree_bytes(bundle.params)
    assert (result["bpw_body"], result["bpw"]["total"]) == bits_per_weight(bundle.params, config) == (32, 32)


def test_pictures_take_the_tokens_that_were_said(tmp_path):
    """Sizes by name and by file, upright by EXIF, under the directory's own size rule."""
    config = tiny_config()
    processor = ImageProcessor(config.vision.patch_size, max_size=20)
    avl.save(Bundle(config, tiny_params(config), None, processor), tmp_path / "model")
    files, exif = [], Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    for i, (name, options) in enumerate([("a.png", {}), ("b.jpg", {"exif": exif}), ("c.webp", {}), ("d.png", {"exif": exif})]):
        pixels = np.random.default_rng(i).integers(0, 256, (9 + i, 30 - 5 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name, **options)
        files.append(str(tmp_path / name))
    found = describe_checkpoint(str(tmp_path / "model"), [(30, 9)], files)["pictures"]
    for file, picture in zip(files, found[1:], strict=True):
        prepared = prepare_image(file, processor)
        assert picture["visual_tokens"] == prepared.visual_tokens
        assert tuple(picture["canvas"]) == prepared.canvas.shape[1::-1]
    assert {**found[0], "picture": files[0]} == found[1]  # the first file's size
    smaller = describe_checkpoint(str(tmp_path / "model"), [(30, 9)], max_size=10)["pictures"][0]
    assert smaller["visual_tokens"] < found[0]["visual_tokens"]


def test_a_picture_is_measured_by_its_header_alone(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:100])  # signature, IHDR and nothing else
    found = describe_checkpoint("andesvl-1b", [(1280, 720)], [str(tmp_path / "cut.png")])["pictures"]
    assert found[1]["size"] == [1280, 720] and found[1]["visual_tokens"] == found[0]["visual_tokens"]
    with pytest.raises(UserError, match="truncated or damaged"):
        prepare_image(tmp_path / "cut.png", ImageProcessor(14))


def test_the_command_prints_a_table_and_refuses_what_it_cannot_measure(sparse_4b, tmp_path, capsys):
    assert main(["info", "--model", str(sparse_4b), "--size", "448x448", "--size", "1x1", "--json"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    keys = "parameters bytes_on_disk bytes bytes_in_memory bpw bpw_body bpw_all kv_bytes_per_token kv_bytes_per_1000_tokens"
    assert set(json.loads(last)) == {*keys.split(), "pictures"}
    assert "448x448: canvas 476x476, 289 visual tokens" in "\n".join(table)
    for arguments, mention in (
        (["--size", "5000x1"], "too thin"),
        (["--size", "0x10"], "at least 1x1"),
        (["--size", "100000x100000"], "at most"),
        (["--image", str(tmp_path / "none.png")], "no such image"),
        (["--size", "10x10", "--max-size", "0"], "max_size"),
    ):
        assert main(["info", "--model", "andesvl-1b", *arguments]) == 2
        error = capsys.readouterr().err
        assert mention in error and len(error.splitlines()) == 1
    with pytest.raises(SystemExit, match="2"):
        main(["info", "--model", "andesvl-1b", "--size", "large"])
    assert "1280x720" in capsys.readouterr().err


def test_damaged_headers_and_wrong_types_are_refused_by_file(sparse_4b, tmp_path):
    with open(sparse_4b / "model.safetensors", "rb") as file:
        (tmp_path / "model.safetensors").write_bytes(file.read(500))
    (tmp_path / "config.json").write_text((sparse_4b / "config.json").read_text())
    with pytest.raises(UserError, match="model.safetensors"):
        describe_checkpoint(str(tmp_path))
    raw = json.loads((sparse_4b / "config.json").read_text()) | {"torch_dtype": "int4"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="torch_dtype"):
        describe_checkpoint(str(tmp_path))
