"""Bit parity with the released preprocessing, the size rule's properties, and pictures nobody should be able to hurt us with."""

import dataclasses
import hashlib
import io
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from andesvl_jax import config
from andesvl_jax.config import CONFIGS
from andesvl_jax.errors import UserError
from andesvl_jax.inputs import image as image_module
from andesvl_jax.inputs.image import ImageProcessor, open_image, patchify, plan_size, prepare_image, to_canvas

GOLDEN = Path(__file__).parents[1] / "golden"
SETS = ("aimv2_a", "aimv2_c_multi_image_text", "siglip2_c_multi")
VISION = {"aimv2": CONFIGS["andesvl-1b"].vision, "siglip2": CONFIGS["andesvl-0.6b"].vision}
AIMV2, SIGLIP2 = (ImageProcessor.from_hf({}, VISION[family]) for family in ("aimv2", "siglip2"))


EVALUATION_FIELDS = ("image_scale", "min_size", "max_size")


def evaluation(base: int, image_scale: float, min_size: int, max_size: int) -> ImageProcessor:
    rule = {"size_rule": "evaluation", "image_scale": image_scale, "min_size": min_size, "max_size": max_size}
    return dataclasses.replace(AIMV2 if base == 28 else SIGLIP2, **rule)


def read_json(*parts):
    return json.loads(GOLDEN.joinpath(*parts).read_text())


def test_every_row_of_the_plan_table():
    table = read_json("preprocess", "plan_table.json")
    assert table["columns"] == "w h base max_size branch pre_resize new_size canvas offset" and len(table["rows"]) == 1464
    for w, h, base, max_size, branch, *pairs in table["rows"]:
        processor = dataclasses.replace(AIMV2 if base == 28 else SIGLIP2, max_size=max_size)
        expected = (branch, *(pair if pair is None else tuple(pair) for pair in pairs))
        assert dataclasses.astuple(plan_size(w, h, processor)) == expected, (w, h, base, max_size)


def test_every_golden_canvas():
    arrays = np.load(GOLDEN / "preprocess" / "preprocess.npz")
    cases = read_json("preprocess", "cases.json")
    assert len(cases) == 32
    for case in cases:
        processor = ImageProcessor.from_hf({}, VISION[case["family"]], **case["kw"])
        w, h = case["size"]
        prepared = prepare_image(arrays[f"image_{w}x{h}"], processor)
        np.testing.assert_array_equal(prepared.canvas, arrays["canvas_" + case["key"]], err_msg=case["key"])
        plan = plan_size(w, h, processor)
        assert (plan.new, plan.canvas, plan.offset) == tuple(tuple(case["plan"][key]) for key in ("new", "box", "off"))
        assert prepared.visual_tokens == processor.visual_tokens(w, h) == case["tokens"]


@pytest.mark.parametrize("name", SETS)
def test_golden_patches(name):
    arrays, meta = np.load(GOLDEN / name / "golden.npz"), read_json(name, "meta.json")
    vision = config.from_hf(read_json(name, "config.json")).vision
    processor = ImageProcessor.from_hf(read_json(name, "preprocessor_config.json"), vision, meta["max_size"])
    assert processor.background == tuple(meta["background"])
    prepared = [prepare_image(arrays[f"image_{i}"], processor) for i in range(meta["n_images"])]
    for i, one in enumerate(prepared):
        np.testing.assert_array_equal(one.canvas, arrays[f"canvas_{i}"])
    np.testing.assert_array_equal(np.concatenate([one.patches for one in prepared]), arrays["flat_patches"])
    np.testing.assert_array_equal([one.grid for one in prepared], arrays["grid_hw"])
    assert [one.visual_tokens for one in prepared] == meta["image_token_counts"]


def test_every_row_of_the_evaluation_table():
    """Recorded from the public evaluation's own two functions (its vLLM port), both encoders."""
    table = read_json("preprocess", "evaluation_table.json")
    assert table["columns"] == "w h base image_scale min_size max_size new_size canvas offset" and len(table["rows"]) == 1000
    for w, h, base, *rest in table["rows"]:
        plan = plan_size(w, h, evaluation(base, *rest[:3]))
        assert [list(plan.new), list(plan.canvas), list(plan.offset)] == rest[3:], (w, h, base, rest)
        assert (plan.branch == "keep") == ([w, h] == rest[4]) and plan.pre is None


def test_every_evaluation_canvas():
    arrays, cases = np.load(GOLDEN / "preprocess" / "preprocess.npz"), read_json("preprocess", "evaluation_canvases.json")
    assert len(cases) == 101
    for case in cases:
        processor = evaluation({"aimv2": 28, "siglip2": 32}[case["family"]], *(case[k] for k in EVALUATION_FIELDS))
        canvas = to_canvas(arrays[case["image"]], processor)
        assert [canvas.shape[1], canvas.shape[0]] == case["size"]
        assert hashlib.sha256(canvas.tobytes()).hexdigest() == case["sha256"], case


def test_presets_are_the_two_ways_of_the_releases(tmp_path):
    vision = VISION["aimv2"]
    release, evaluation = (ImageProcessor.from_hf({}, vision, preset=name) for name in ("release", "evaluation"))
    assert release == AIMV2 and (release.max_size, evaluation.max_size) == (733, 1792)
    assert plan_size(56, 56, release).canvas == (84, 84) and plan_size(56, 56, evaluation).canvas == (56, 56)
    stored = evaluation.to_hf()
    assert ImageProcessor.from_hf(stored, vision) == evaluation  # a saved checkpoint keeps its rule
    assert ImageProcessor.from_hf(stored, vision, preset="release") == release
    assert ImageProcessor.from_hf({}, vision, 3000, preset="evaluation").max_size == 3000
    with pytest.raises(UserError, match="image preset: found 'vllm', expected one of release, evaluation"):
        ImageProcessor.from_hf({}, vision, preset="vllm")


def test_an_exact_multiple_is_untouched_under_the_evaluation_rule():
    picture = np.random.default_rng(8).integers(0, 256, (84, 56, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_canvas(picture, evaluation(28, 1.0, 0, 1792)), picture)


def test_patch_order_and_features():
    canvas = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    patches, coordinates, grid = patchify(canvas, AIMV2)
    assert grid == (4, 6) and patches.dtype == np.float32 and coordinates.dtype == np.int32
    assert coordinates[:8].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    mean, std = np.array(AIMV2.mean)[:, None, None], np.array(AIMV2.std)[:, None, None]
    for patch, (row, column) in zip(patches, coordinates):
        square = canvas[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14].transpose(2, 0, 1)
        np.testing.assert_allclose(patch.reshape(3, 14, 14), (square / 255 - mean) / std, atol=1e-6)


def test_random_sizes_keep_the_rules():
    rng = np.random.default_rng(1)
    for seed in range(1000):
        processor = (AIMV2, SIGLIP2)[seed % 2]
        processor = dataclasses.replace(processor, max_size=int(rng.integers(100, 1800)))
        w, h = (int(side) for side in np.exp(rng.uniform(0, np.log(6000), 2)) // 1)
        if w * h > image_module.MAX_PIXELS or min(w, h) * 4172 < max(w, h):
            continue
        plan = plan_size(w, h, processor)
        for axis in (0, 1):
            assert plan.canvas[axis] % processor.base == 0 and plan.canvas[axis] <= 4200
            assert 0 <= plan.offset[axis] <= plan.offset[axis] + plan.new[axis] <= plan.canvas[axis] and plan.new[axis] >= 1
        assert processor.visual_tokens(w, h) == plan.canvas[0] * plan.canvas[1] // processor.base**2
        nominal = max(processor.max_size, 2 * processor.base)  # each side grows by at most one base, or from under one to two
        assert plan.canvas[0] * plan.canvas[1] <= nominal**2 + 2 * processor.base * sum(plan.canvas), (w, h)
        if seed % 20 == 0:
            prepared = prepare_image(np.zeros((h, w, 3), np.uint8), processor)
            assert prepared.canvas.shape == (plan.canvas[1], plan.canvas[0], 3)
            rows, columns = prepared.grid
            assert prepared.patches.shape == (rows * columns, 3 * processor.patch_size**2)
            assert prepared.patches.dtype == np.float32
            assert len(np.unique(prepared.coordinates, axis=0)) == rows * columns
            assert prepared.coordinates.max(axis=0).tolist() == [rows - 1, columns - 1]


def test_the_cap_of_a_base_that_does_not_divide_it():
    """4172 is no multiple of 32: where the canvas reaches the cap it takes the multiple below, as base 28 takes 4172 itself."""
    w, h, max_size = 4172, 30, 353
    assert plan_size(w, h, dataclasses.replace(SIGLIP2, max_size=max_size)).canvas == (4160, 64)
    assert plan_size(w, h, dataclasses.replace(AIMV2, max_size=max_size)).canvas == (4172, 56)


def test_one_pixel_fills_the_smallest_canvas():
    pixel = np.full((1, 1, 3), 200, np.uint8)
    assert to_canvas(pixel, AIMV2).shape == (84, 84, 3) and (to_canvas(pixel, AIMV2) == 200).all()
    assert to_canvas(pixel, SIGLIP2).shape == (96, 96, 3)


def test_arrays_pil_images_and_paths_agree(tmp_path):
    array = np.random.default_rng(2).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    expected = to_canvas(array, AIMV2)
    for source in (Image.fromarray(array), tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(to_canvas(source, AIMV2), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_every_mode_is_converted_as_pillow_does(mode):
    rgb = Image.fromarray(np.random.default_rng(3).integers(0, 256, (9, 11, 3), dtype=np.uint8))
    source = rgb.convert(mode)
    opened = open_image(source)
    assert opened.mode == "RGB" and opened.tobytes() == source.convert("RGB").tobytes()


def test_gray_and_rgba_arrays():
    gray = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(np.array(open_image(gray)), np.repeat(gray[..., None], 3, axis=2))
    rgba = np.full((3, 4, 4), (10, 20, 30, 0), np.uint8)
    assert np.array(open_image(rgba)).reshape(-1, 3).tolist() == [[10, 20, 30]] * 12


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 255, 256, 30_000, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    with Image.open(tmp_path / f"a.{suffix}") as picture:
        for source in (tmp_path / f"a.{suffix}", picture):
            np.testing.assert_array_equal(np.array(open_image(source)), np.repeat(values[..., None] >> 8, 3, axis=2))
    for mode, order in (("I;16", "<u2"), ("I;16B", ">u2")):
        source = Image.frombytes(mode, (5, 1), values.astype(order).tobytes())
        np.testing.assert_array_equal(np.array(open_image(source))[..., 0], values >> 8)


def test_16_bit_colour_is_read_by_its_high_byte_too(tmp_path):
    values = np.array([[[0, 300, 65_535]]], ">u2")
    header = b"IHDR" + struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" + values.tobytes())
    chunks = b"\x89PNG\r\n\x1a\n"
    for chunk in (header, data, b"IEND"):
        chunks += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(chunks)
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (0, 1, 255)


@pytest.mark.filterwarnings("error")
def test_transparency_is_dropped_without_a_word(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for mode in ("P", "L"):
        picture = Image.fromarray(grey).convert(mode)
        picture.save(tmp_path / "a.png", transparency=bytes(range(256)) if mode == "P" else 7)
        np.testing.assert_array_equal(np.array(open_image(tmp_path / "a.png"))[..., 0], grey)


def test_a_cmyk_jpeg_has_the_colours_a_viewer_shows(tmp_path):
    colour = (200, 40, 90)
    Image.new("RGB", (16, 16), colour).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert np.abs(np.array(open_image(tmp_path / "a.jpg"))[8, 8].astype(int) - colour).max() <= 3  # JPEG's rounding


def test_exif_rotation_is_applied_once(tmp_path):
    array = np.random.default_rng(4).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as picture:
        for source in (tmp_path / "a.png", picture, picture.convert("RGB"), ImageOps.exif_transpose(picture)):
            np.testing.assert_array_equal(np.array(open_image(source)), np.rot90(array, -1))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    lossless = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **lossless)
    assert open_image(tmp_path / f"a.{suffix}").getpixel((0, 0)) == (255, 0, 0)
    with Image.open(tmp_path / f"a.{suffix}") as picture:
        picture.seek(1)
        assert open_image(picture).getpixel((0, 0)) == (0, 0, 255)  # the frame that the caller chose


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be opened as an image; expected a file of type PNG, JPEG"),
        (b"not an image at all", "cannot be opened as an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be opened as an image"),
        (encoded("PNG")[:1000], "(PNG): the image data are truncated or damaged"),
        (encoded("JPEG")[:-800], "(JPEG): the image data are truncated or damaged"),
        (encoded("PNG")[:200] + bytes(300) + encoded("PNG")[500:], "(PNG): the image data are truncated or damaged"),
        (png_header(20_000, 20_000), "the image is too large"),
        (png_header(8_001, 8_001), "the size is 8001x8001, expected at most 64,000,000 pixels"),
        (png_header(0, 10), "cannot be opened as an image"),
        (png_header(10, 10), "truncated or damaged"),
    ],
    ids=["empty", "text", "eps", "cut_png", "cut_jpeg", "holed_png", "bomb", "over_limit", "no_width", "no_pixels"],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, content, message):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        prepare_image(path, AIMV2)
    assert "bad.png" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "error::ResourceWarning")
def test_a_large_picture_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    (tmp_path / "large.png").write_bytes(png_header(12_000, 8_000))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match="the size is 12000x8000, expected at most"):
        open_image(tmp_path / "large.png")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_files_never_raise_anything_else(tmp_path):
    rng = np.random.default_rng(6)
    path = tmp_path / "fuzz"
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        original = np.frombuffer(encoded(form), np.uint8)
        for _ in range(30):
            damaged = original.copy()
            damaged[rng.integers(0, min(len(damaged), 400), 8)] = rng.integers(0, 256, 8)
            path.write_bytes(damaged.tobytes()[: rng.integers(10, len(damaged))])
            try:
                open_image(path)
            except UserError:
                continue


@pytest.mark.parametrize("name", ["absent.png", ".", "a\x00b", "x" * 5000])
def test_paths_that_are_no_files(tmp_path, name):
    with pytest.raises(UserError, match="no such image file"):
        open_image(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "image array is float32 [4, 4, 3], expected uint8"),
        (np.zeros((3, 4, 4, 3), np.uint8), "image array is uint8 [3, 4, 4, 3]"),
        (np.zeros((4, 4, 2), np.uint8), "image array is uint8 [4, 4, 2]"),
        (np.zeros((0, 4, 3), np.uint8), "image array: the size is 4x0"),
        (Image.new("RGB", (0, 0)), "PIL image: the size is 0x0"),
        (np.broadcast_to(np.uint8(0), (9000, 9000, 3)), "image array: the size is 9000x9000"),
        (None, "image is of type NoneType"),
        (b"abc", "image is of type bytes"),
    ],
)
def test_other_sources_are_refused(source, message):
    with pytest.raises(UserError, match=re.escape(message)):
        open_image(source)


def test_thin_pictures():
    assert plan_size(20_000, 10, AIMV2).pre == (4172, 2)
    for size in ((20_000, 4), (4, 20_000), (5000, 1)):
        with pytest.raises(UserError, match="too thin"):
            plan_size(*size, AIMV2)
    with pytest.raises(UserError, match="too thin"):  # vanishes in the area rule
        plan_size(4172, 1, dataclasses.replace(AIMV2, max_size=10))
    with pytest.raises(UserError, match="too thin"):
        plan_size(5000, 1, evaluation(28, 1.0, 0, 1792))
    with pytest.raises(UserError, match="image: the size is 20000x20000"):
        plan_size(20_000, 20_000, AIMV2)


def test_no_setting_makes_a_canvas_beyond_the_limit():
    """A hostile preprocessor_config.json must not allocate a canvas of terabytes."""
    for processor in (
        dataclasses.replace(AIMV2, min_tokens=10**6, max_resolution=10**6),
        dataclasses.replace(evaluation(28, 16.0, 10**6, 10**6), max_resolution=10**6),
        dataclasses.replace(evaluation(32, 1.0, 0, 1792), min_tokens=10**6, max_size=10**6),
    ):
        with pytest.raises(UserError, match="canvas: the size is .*, expected at most 64,000,000 pixels"):
            plan_size(600, 600, processor)


def test_processor_configs_round_trip():
    for family, vision in VISION.items():
        processor = ImageProcessor.from_hf({}, vision, max_size=500)
        raw = json.loads(json.dumps(processor.to_hf()))
        assert ImageProcessor.from_hf(raw, vision) == processor
        assert ImageProcessor.from_hf(raw, vision, max_size=600).max_size == 600
        assert processor.patch_size == (14 if family == "aimv2" else 16)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"patch_size": 16}, "preprocessor_config.json: patch_size is 16, expected 14 for this aimv2 encoder"),
        ({"hidden_stride": 4}, "preprocessor_config.json: hidden_stride is 4"),
        ({"do_resize": True}, "preprocessor_config.json: do_resize is True, expected False"),
        ({"do_normalize": False}, "preprocessor_config.json: do_normalize is False"),
        ({"resample": 2}, "preprocessor_config.json: resample is 2"),
        ({"rescale_factor": 1.0}, "preprocessor_config.json: rescale_factor is 1.0"),
        ({"image_mean": [0.5]}, "image processor field mean: found (0.5,)"),
        ({"image_mean": None}, "image processor field mean: found None"),
        ({"image_mean": [0.5, 0.5, "x"]}, "image processor field mean"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image processor field std"),
        ({"image_std": [0.5, float("nan"), 0.5]}, "image processor field std"),
        ({"max_size": 0}, "image processor field max_size: found 0"),
        ({"max_size": "733"}, "image processor field max_size: found '733'"),
        ({"min_tokens": -1}, "image processor field min_tokens"),
        ({"max_resolution": 20}, "image processor field max_resolution: found 20, expected at least 28"),
        ({"max_size": 10**400}, "image processor field max_size"),
        ({"size_rule": "vllm"}, "image processor field size_rule: found 'vllm'"),
        ({"size_rule": "evaluation", "min_size": -1}, "image processor field min_size: found -1"),
        ({"size_rule": "evaluation", "image_scale": 1e308}, "image processor field image_scale: found 1e+308"),
        ({"size_rule": "evaluation", "image_scale": 0}, "image processor field image_scale: found 0"),
        ({"min_size": 1792}, "under size_rule 'release', which has no such steps"),
        ({"image_scale": 2.0}, "under size_rule 'release', which has no such steps"),
    ],
)
def test_processor_configs_that_cannot_be_honoured(raw, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        ImageProcessor.from_hf(raw, VISION["aimv2"])
    assert "preprocessor_config.json" in str(caught.value)


def test_every_field_of_the_processor_matters():
    picture = np.random.default_rng(7).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    small = picture[:20, :20]

    def outputs(processor, source):
        prepared = prepare_image(source, processor)
        return prepared.patches.shape, prepared.patches.sum(), prepared.canvas.sum()

    changes = {
        "patch_size": 16, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "max_size": 90, "min_tokens": 40,
        "max_resolution": 150, "size_rule": "evaluation",
    }  # fmt: skip
    scaling = {"min_size": 300, "image_scale": 2.0}
    assert {*changes, *scaling, "merge_size"} == {field.name for field in dataclasses.fields(ImageProcessor)}
    for name, value in changes.items():
        changed = dataclasses.replace(AIMV2, **{name: value})
        assert outputs(changed, picture) != outputs(AIMV2, picture) or outputs(changed, small) != outputs(AIMV2, small), name
    for name, value in scaling.items():
        unscaled = evaluation(28, 1.0, 0, 733)
        assert outputs(dataclasses.replace(unscaled, **{name: value}), picture) != outputs(unscaled, picture), name
    with pytest.raises(UserError, match="merge_size: found 3, expected 2"):
        dataclasses.replace(AIMV2, merge_size=3)


@pytest.mark.parametrize(("shape", "dtype"), [((28, 30, 3), np.uint8), ((28, 28, 3), np.float32), ((28, 28), np.uint8)])
def test_patchify_names_a_wrong_canvas(shape, dtype):
    with pytest.raises(UserError, match="canvas is .* multiples of 28"):
        patchify(np.zeros(shape, dtype), AIMV2)
