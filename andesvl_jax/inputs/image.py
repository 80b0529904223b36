"""Native-resolution image preprocessing: any picture -> canvas -> normalised patches in 2x2 block order.

Two size rules exist, each exact with its quirks, because the trained position grids depend on them: the one of the released
checkpoints, whose canvas always grows to the next multiple of the base, even from an exact multiple, and the one of their
public evaluation (vLLM port), which keeps exact multiples. Sizes are (width, height), grids (rows, columns). All of it runs on
the host in NumPy and Pillow.
"""

import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Mapping

import numpy as np
from einops import rearrange
from PIL import ExifTags, Image, ImageOps

from andesvl_jax.config import AIMV2_MEAN, AIMV2_STD, VisionConfig
from andesvl_jax.errors import UserError

ImageSource = np.ndarray | Image.Image | str | PathLike

MAX_PIXELS = 64_000_000  # above the largest common phone sensor mode (50 MP); 192 MB once decoded to RGB
MAX_SIDE = 1_000_000  # bound of the size rule's numbers, so that none overflows
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # decoded in process; EPS would start Ghostscript
_FAMILY_STATISTICS = {"aimv2": (AIMV2_MEAN, AIMV2_STD), "siglip2": ((0.5,) * 3, (0.5,) * 3)}

# The two ways the releases see pictures, by name: as shipped, and as evaluated. The same picture has other canvases in each.
PRESETS: dict[str, dict[str, Any]] = {
    "release": {"size_rule": "release", "max_size": 733, "min_size": 0, "image_scale": 1.0},
    "evaluation": {"size_rule": "evaluation", "max_size": 1792, "min_size": 0, "image_scale": 1.0},
}

# Steps of HF image processors that this pipeline does not have or always has: accepted at these values alone.
_FIXED = {
    "do_resize": False, "do_center_crop": False, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
    "resample": 3, "temporal_patch_size": 1,
}  # fmt: skip


@dataclass(frozen=True)
class ImageProcessor:
    """How pictures become patches. Sides in pixels; `mean` and `std` per RGB channel on the 0..1 scale.

    Raises:
      UserError: a value that no picture could be processed with.
    """

    patch_size: int
    merge_size: int = 2
    mean: tuple[float, float, float] = AIMV2_MEAN
    std: tuple[float, float, float] = AIMV2_STD
    max_size: int = 733  # canvases above max_size^2 pixels are scaled down (nominally; the canvas then grows to the base)
    min_tokens: int = 4  # pictures below min_tokens * base^2 pixels are scaled up
    max_resolution: int = 4172  # longest side after the first downscale
    size_rule: Literal["release", "evaluation"] = "release"
    min_size: int = 0  # evaluation only: pictures below min_size^2 pixels are scaled up (GUI benchmarks: 1792)
    image_scale: float = 1.0  # evaluation only: both sides are scaled by this first (small print: 2)

    def __post_init__(self):
        least = {"patch_size": 1, "merge_size": 1, "max_size": 1, "min_tokens": 1, "max_resolution": 1, "min_size": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_SIDE:
                raise UserError(
                    f"image processor field {name}: found {value!r}, expected a whole number from {low} to {MAX_SIDE:,}."
                )
        if self.merge_size != 2:
            raise UserError(f"image processor field merge_size: found {self.merge_size}, expected 2, the only merge there is.")
        if self.max_resolution < self.base:
            raise UserError(
                f"image processor field max_resolution: found {self.max_resolution}, expected at least {self.base} pixels, "
                "one visual token."
            )
        if self.size_rule not in ("release", "evaluation"):
            raise UserError(f"image processor field size_rule: found {self.size_rule!r}, expected 'release' or 'evaluation'.")
        if not _is_finite(self.image_scale) or not 1 / 16 <= self.image_scale <= 16:
            raise UserError(f"image processor field image_scale: found {self.image_scale!r}, expected a number from 1/16 to 16.")
        if self.size_rule == "release" and (self.min_size, self.image_scale) != (0, 1):
            raise UserError(
                f"image processor fields min_size and image_scale: found {self.min_size} and {self.image_scale}, expected 0 and "
                "1 under size_rule 'release', which has no such steps; take size_rule 'evaluation'."
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            numbers = isinstance(values, tuple) and len(values) == 3 and all(_is_finite(value) for value in values)
            if not numbers or not 0 <= min(values) <= max(values) <= 1 or (name == "std" and min(values) == 0):
                expected = "three numbers in 0..1" if name == "mean" else "three numbers above 0, at most 1"
                raise UserError(f"image processor field {name}: found {values!r}, expected {expected}.")

    @property
    def base(self) -> int:
        """Side in pixels of the square that becomes one visual token."""
        return self.patch_size * self.merge_size

    @property
    def background(self) -> tuple[int, int, int]:
        """Canvas colour: the mean, so that borders normalise to about zero."""
        red, green, blue = (int(value * 255) for value in self.mean)
        return red, green, blue

    def visual_tokens(self, width: int, height: int) -> int:
        """Visual tokens of a picture of this size. Raises UserError as `plan_size` does."""
        columns, rows = (side // self.base for side in plan_size(width, height, self).canvas)
        return rows * columns

    @classmethod
    def from_hf(
        cls, raw: Mapping[str, Any], vision: VisionConfig, max_size: int | None = None, source: str = "preprocessor_config.json",
        preset: str | None = None,
    ) -> "ImageProcessor":  # fmt: skip
        """Reads a parsed `preprocessor_config.json`; the encoder family fills absent statistics.

        Args:
          raw: the parsed JSON object, `{}` where there is none; `source` names it in errors.
          vision: the encoder the patches are for; its patch and merge size must be the file's.
          max_size: overrides the value of the file or preset.
          preset: a name of PRESETS, which overrides the size rule of the file; None keeps the file's (the releases store none
            and run as "release").
        Raises:
          UserError: a step or value that this pipeline or this encoder cannot honour.
        """
        mean, std = _FAMILY_STATISTICS[vision.family]
        fixed = _FIXED | {"patch_size": vision.patch_size, "hidden_stride": vision.merge_size}
        for key, value in fixed.items():
            if raw.get(key, value) != value:
                raise UserError(f"{source}: {key} is {raw[key]!r}, expected {value!r} for this {vision.family} encoder.")
        factor = raw.get("rescale_factor", 1 / 255)
        if not _is_finite(factor) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
            raise UserError(f"{source}: rescale_factor is {factor!r}, expected 1/255.")
        if preset is not None and preset not in PRESETS:
            raise UserError(f"image preset: found {preset!r}, expected one of {', '.join(PRESETS)}.")
        optional = {key: raw[key] for key in (*PRESETS["release"], "min_tokens", "max_resolution") if key in raw}
        optional |= PRESETS.get(preset, {})
        if max_size is not None:
            optional["max_size"] = max_size
        try:
            return cls(
                patch_size=vision.patch_size, merge_size=vision.merge_size, mean=_as_tuple(raw.get("image_mean", mean)),
                std=_as_tuple(raw.get("image_std", std)), **optional,
            )  # fmt: skip
        except UserError as error:
            raise UserError(f"{source}: {error}") from error

    def to_hf(self) -> dict[str, Any]:
        """The inverse of `from_hf`: the keys of the releases, plus the size rule and its numbers."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            **_FIXED,
            "rescale_factor": 1 / 255,
            "crop_size": {"height": -1, "width": -1},
            "size": {"shortest_edge": -1},
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "patch_size": self.patch_size,
            "hidden_stride": self.merge_size,
            **{key: getattr(self, key) for key in (*PRESETS["release"], "min_tokens", "max_resolution")},
        }


@dataclass(frozen=True)
class SizePlan:
    """Where a picture goes. Every pair is (width, height) in pixels."""

    branch: Literal["pad", "max", "min", "fit", "keep"]  # the first three: release; fit, keep (untouched): evaluation
    pre: tuple[int, int] | None  # first downscale, of pictures longer than max_resolution
    new: tuple[int, int]  # size the picture is resized to
    canvas: tuple[int, int]  # multiples of the base
    offset: tuple[int, int]  # of the picture's top-left corner on the canvas


@dataclass(frozen=True)
class Patches:
    """One prepared picture: P = rows * columns patches of side p."""

    canvas: np.ndarray  # uint8 [H, W, 3]
    patches: np.ndarray  # float32 [P, 3*p*p], 2x2 block order; features channel, row, column
    coordinates: np.ndarray  # int32 [P, 2], (row, column) of each patch
    grid: tuple[int, int]  # (rows, columns)

    @property
    def visual_tokens(self) -> int:
        return self.patches.shape[0] // 4  # a 2x2 block is one visual token


def plan_size(width: int, height: int, processor: ImageProcessor) -> SizePlan:
    """The processor's size rule, in double precision and its exact order of operations.

    Raises:
      UserError: a side below 1 pixel, more than MAX_PIXELS of picture or canvas, or a picture so thin that a side rounds to 0
        pixels.
    """
    _check_size(width, height, "image")
    plan = (_plan_release if processor.size_rule == "release" else _plan_evaluation)(width, height, processor)
    _refuse_vanished(plan.new, width, height)
    _check_size(*plan.canvas, "canvas")
    return plan


def _plan_release(width: int, height: int, processor: ImageProcessor) -> SizePlan:
    base, cap = processor.base, processor.max_resolution
    w, h, pre = width, height, None
    if max(w, h) > cap:
        scale = cap / max(w, h)
        w, h = pre = int(w * scale), int(h * scale)
        _refuse_vanished(pre, width, height)
    if w * h > processor.max_size**2:
        branch, (canvas, new) = "max", _fit_area(w, h, processor.max_size, base, cap)
    elif w * h < base**2 * processor.min_tokens:
        branch, (canvas, new) = "min", _fit_area(w, h, int(base * math.sqrt(processor.min_tokens)), base, cap)
    else:
        branch, (canvas, new) = "pad", _fit_next_multiple(w, h, base)
    offset = ((canvas[0] - new[0]) // 2, (canvas[1] - new[1]) // 2)
    return SizePlan(branch, pre, new, canvas, offset)


def _plan_evaluation(width: int, height: int, processor: ImageProcessor) -> SizePlan:
    """Scales the size, not the picture, step by step; the picture is resampled once, or not at all where it fits as it is."""
    base = processor.base
    w, h = width * float(processor.image_scale), height * float(processor.image_scale)
    if max(w, h) > processor.max_resolution:
        scale = processor.max_resolution / max(w, h)
        w, h = w * scale, h * scale
    for least in (base**2 * processor.min_tokens, processor.min_size**2):
        if w * h < least:
            scale = math.sqrt(least / (w * h))
            w, h = w * scale, h * scale
    if w * h > processor.max_size**2:
        scale = math.sqrt(processor.max_size**2 / (w * h))
        w, h = w * scale, h * scale
    canvas = math.ceil(w / base) * base, math.ceil(h / base) * base
    if canvas == (width, height):
        return SizePlan("keep", None, canvas, canvas, (0, 0))
    scale = min(canvas[0] / width, canvas[1] / height)
    new = width * scale, height * scale
    offset = int((canvas[0] - new[0]) / 2), int((canvas[1] - new[1]) / 2)
    return SizePlan("fit", None, (int(new[0]), int(new[1])), canvas, offset)


def _fit_area(w: int, h: int, side: int, base: int, cap: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(canvas, new) for a picture rescaled to about side^2 pixels."""
    ratio = w / h
    # The released cap 4172 is no multiple of base 32 (SigLIP2) and the original stops there; the canvas takes the multiple below.
    canvas_cap = cap - cap % base

    def grow(length: float) -> int:
        capped = max(min(math.floor(length), cap), base)
        return min(capped + (base - capped % base), canvas_cap)

    canvas = grow(math.sqrt(side**2 * ratio)), grow(math.sqrt(side**2 / ratio))
    scale = min(canvas[0] / w, canvas[1] / h)
    return canvas, (round(w * scale), round(h * scale))


def _fit_next_multiple(w: int, h: int, base: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(canvas, new) for a picture of an acceptable area; an exact multiple of the base grows by one base, as in the release."""
    canvas = w + base - w % base, h + base - h % base
    scale = min(canvas[0] / w, canvas[1] / h)
    return canvas, (int(w * scale), int(h * scale))


def open_image(source: ImageSource) -> Image.Image:
    """Any picture as a PIL image of mode RGB, upright.

    Modes are converted as Pillow's `convert("RGB")` does (alpha is dropped, not blended; colour profiles are ignored), except
    that 16-bit grey is scaled to 8 bits, where Pillow would clip it. EXIF rotation is applied.

    Args:
      source: uint8 array [H, W], [H, W, 3] or [H, W, 4]; PIL image, at its current frame; or the path of a file of one of
        FORMATS, of whose frames the first is taken.
    Raises:
      UserError: anything else, a damaged file, or more than MAX_PIXELS (refused before decoding).
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "PIL image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, (str, PathLike)):
        return _from_file(Path(source))
    raise UserError(f"image is of type {type(source).__name__}, expected a uint8 array, a PIL image or a path.")


def _from_array(array: np.ndarray) -> Image.Image:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not shaped:
        raise UserError(f"image array is {array.dtype} {list(array.shape)}, expected uint8 [height, width, 3].")
    _check_size(array.shape[1], array.shape[0], "image array")
    return Image.fromarray(array).convert("RGB")


def image_size(path: str | PathLike) -> tuple[int, int]:
    """(width, height) of a picture file as it stands upright, read from its header alone; nothing is decoded.

    A PNG whose orientation stands behind its pixels counts as not rotated. Raises UserError as `open_image` does.
    """
    with _opened(Path(path)) as image:
        try:  # Pillow would decode a PNG to look for an orientation behind the pixels
            turned = image.format != "PNG" or "exif" in image.info
            rotated = turned and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        except Exception as error:
            raise UserError(f"{str(path)[:200]}: the image header is damaged ({error}).") from error
        _check_size(*image.size, str(path)[:200])
        return image.size[::-1] if rotated else image.size


def _from_file(path: Path) -> Image.Image:
    with _opened(path) as image:
        return _to_rgb(image, f"{str(path)[:200]} ({image.format})")


def _opened(path: Path) -> Image.Image:
    name = str(path)[:200]
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a name too long or with a NUL byte
        is_file = False
    if not is_file:
        raise UserError(f"{name}: no such image file.")
    try:
        return Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{name}: the image is too large ({error}); expected at most {MAX_PIXELS:,} pixels.") from error
    except Exception as error:  # Pillow's header parsers raise many types on damaged files
        raise UserError(f"{name}: cannot be opened as an image; expected a file of type {', '.join(FORMATS)}.") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_size(*image.size, name)  # the header's size, before anything is decoded
    sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    try:
        picture = ImageOps.exif_transpose(image)  # a copy
        picture.info.pop("transparency", None)  # alpha is dropped; Pillow would warn about palettes that have it
        if sixteen_bit:  # the high byte, as Pillow reads 16-bit colour
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        picture = picture.convert("RGB")
    except Exception as error:  # and so do its decoders
        raise UserError(f"{name}: the image data are truncated or damaged ({error}).") from error
    _check_size(*picture.size, name)
    return picture


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise UserError(f"{name}: the size is {width}x{height}, expected at least 1x1 pixel.")
    if width * height > MAX_PIXELS:
        raise UserError(f"{name}: the size is {width}x{height}, expected at most {MAX_PIXELS:,} pixels.")


def _refuse_vanished(size: tuple[int, int], width: int, height: int) -> None:
    if min(size) < 1:
        raise UserError(
            f"image of {width}x{height} pixels is too thin: scaled down it has {size[0]}x{size[1]} pixels, expected at least 1x1."
        )


def to_canvas(image: ImageSource, processor: ImageProcessor) -> np.ndarray:
    """The picture resized (bicubic, antialiased) and centred on a canvas of the mean colour: uint8 [H, W, 3].

    Raises UserError as `open_image` and `plan_size` do.
    """
    picture = open_image(image)
    plan = plan_size(*picture.size, processor)
    if plan.pre is not None:  # resampled twice, as in the release
        picture = picture.resize(plan.pre, Image.Resampling.BICUBIC)
    picture = picture.resize(plan.new, Image.Resampling.BICUBIC)  # a copy where the size is the same
    canvas = Image.new("RGB", plan.canvas, processor.background)
    canvas.paste(picture, plan.offset)
    return np.array(canvas)


def patchify(canvas: np.ndarray, processor: ImageProcessor) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Normalised patches of a canvas in 2x2 block order.

    Blocks come row-major; inside a block top-left, top-right, bottom-left, bottom-right.

    Args:
      canvas: uint8 [H, W, 3], both sides multiples of the base.
    Returns:
      patches float32 [P, 3*p*p] with features in order channel, row, column; coordinates int32 [P, 2] as (row, column);
      grid (rows, columns).
    Raises:
      UserError: another dtype or shape.
    """
    base = processor.base
    shaped = canvas.ndim == 3 and canvas.shape[2] == 3 and canvas.shape[0] % base == canvas.shape[1] % base == 0
    if canvas.dtype != np.uint8 or not shaped:
        found = f"{canvas.dtype} {list(canvas.shape)}"
        raise UserError(f"canvas is {found}, expected uint8 [H, W, 3] with H and W multiples of {base}.")
    p, m = processor.patch_size, processor.merge_size
    rows, columns = canvas.shape[0] // p, canvas.shape[1] // p
    pixels = rearrange(canvas, "(hb i ph) (wb j pw) c -> (hb wb i j) c (ph pw)", i=m, ph=p, j=m, pw=p)
    values = pixels.astype(np.float32)
    values /= np.float32(255)
    values -= np.asarray(processor.mean, np.float32)[:, None]
    values /= np.asarray(processor.std, np.float32)[:, None]
    raster = np.indices((rows, columns), dtype=np.int32)
    coordinates = rearrange(raster, "rc (hb i) (wb j) -> (hb wb i j) rc", i=m, j=m)
    return values.reshape(rows * columns, 3 * p * p), np.ascontiguousarray(coordinates), (rows, columns)


def prepare_image(image: ImageSource, processor: ImageProcessor) -> Patches:
    """A picture as the encoder takes it. Raises UserError as `open_image` and `plan_size` do."""
    canvas = to_canvas(image, processor)
    return Patches(canvas, *patchify(canvas, processor))


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _as_tuple(values: Any) -> Any:
    return tuple(values) if isinstance(values, (list, tuple)) else values
