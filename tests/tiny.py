"""Tiny networks of both families and random conversations for them, for tests that need the whole path and no time."""

import jax
import jax.numpy as jnp
import numpy as np

from andesvl_jax.config import AndesVLConfig, TextConfig, VisionConfig
from andesvl_jax.inputs.image import ImageProcessor, Patches, patchify
from andesvl_jax.inputs.packing import Batch, Budget, Sample, assemble, make_sample
from andesvl_jax.model.andesvl import AndesVL, describe
from andesvl_jax.weights import is_param

FAMILIES = ("aimv2", "siglip2")
IMAGE_TOKEN = 60
_FAMILY = {
    "aimv2": {},
    "siglip2": {"norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "qkv_bias": True, "use_bias": True},
}


def tiny_config(family: str = "aimv2", vision: dict | None = None, text: dict | None = None, **top) -> AndesVLConfig:
    """Two layers of every kind, widths of 16 to 32, patches of 2x2 pixels, a 5x5 position table; changes by part."""
    base = {
        "family": family, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2, "patch_size": 2,
        "table_side": 5, "window_size": 8,
    }  # fmt: skip
    language = {
        "vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 8, "rope_theta": 1e4, "max_position_embeddings": 256,
    }  # fmt: skip
    return AndesVLConfig(
        vision=VisionConfig(**(base | _FAMILY[family] | (vision or {}))),
        text=TextConfig(**(language | (text or {}))),
        **({"image_token_id": IMAGE_TOKEN} | top),
    )


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process with that many CPU devices, for a few steps: a third less to compile without LLVM's passes."""
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"


def tiny_params(config: AndesVLConfig, seed: int = 0) -> AndesVL:
    """Random parameters in which nothing is zero or one: biases, norms and tables are perturbed too, so that each one counts."""
    rng = np.random.default_rng(seed)

    def value(param) -> jax.Array:
        mean = {"ones": 1.0}.get(param.init, 0.0)
        deviation = param.shape[-2] ** -0.5 if param.init == "normal" else 0.2
        return jnp.asarray(mean + deviation * rng.normal(size=param.shape), config.param_dtype)

    return jax.tree.map(value, describe(config), is_leaf=is_param)


def random_image(config: AndesVLConfig, rng: np.random.Generator, rows: int, columns: int) -> Patches:
    """A picture of noise of rows x columns patches (both even)."""
    processor = ImageProcessor(patch_size=config.vision.patch_size)
    side = config.vision.patch_size
    canvas = rng.integers(0, 256, (rows * side, columns * side, 3), dtype=np.uint8)
    return Patches(canvas, *patchify(canvas, processor))


def random_sample(
    config: AndesVLConfig, rng: np.random.Generator, grids: tuple[tuple[int, int], ...] = ((2, 4),), text: int = 8
) -> Sample:
    """A conversation of `text` random tokens with pictures of these grids at random places; half of the text is supervised."""
    images = [random_image(config, rng, *grid) for grid in grids]
    cuts = np.sort(rng.integers(1, text, len(images)))
    pieces = np.split(rng.integers(0, IMAGE_TOKEN, text), cuts)
    tokens = list(pieces[0])
    for image, piece in zip(images, pieces[1:], strict=True):
        tokens += [IMAGE_TOKEN] * image.visual_tokens + list(piece)
    supervised = (np.array(tokens) != IMAGE_TOKEN) & (rng.random(len(tokens)) < 0.5)
    supervised[-1] = True
    return make_sample(tokens, supervised, images, IMAGE_TOKEN)


def tiny_batch(config: AndesVLConfig, rows: list[list[Sample]], tokens=48, patches=64, targets=24) -> Batch:
    """Rows of samples padded to one small static shape."""
    return assemble(rows, Budget(len(rows), tokens, patches, targets), config.vision.patch_features)


def max_relative(found, expected) -> float:
    """max|found - expected| / max|expected|: the project's measure of numerical agreement."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), np.finfo(np.float32).tiny))


def worst_leaf(found, expected) -> tuple[float, str]:
    """The largest `max_relative` among the leaves of two equal trees, and where it is."""
    flat, _ = jax.tree_util.tree_flatten_with_path(found)
    others = jax.tree.leaves(expected)
    return max((max_relative(a, b), jax.tree_util.keystr(path)) for (path, a), b in zip(flat, others, strict=True))
