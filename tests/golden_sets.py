"""What the network is compared with: the stored golden sets, and settings that they lack, computed by `reference`.

The stored sets hold activations of an independent float32 reference of the published architecture with random weights.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from reference import activations
from tiny import max_relative, tiny_config, tiny_params

import andesvl_jax as avl
from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.checkpoints.hf import params_to_hf
from andesvl_jax.config import AndesVLConfig
from andesvl_jax.inputs.image import ImageProcessor, to_canvas

GOLDEN = Path(__file__).parent / "golden"
STORED = ("aimv2_a", "aimv2_c_multi_image_text", "siglip2_c_multi")
# float32 against float32 with other summation orders: measured 3e-6; swapping erf and tanh GELU would already be 1.3e-4
TOLERANCE = 3e-5
# settings that the stored sets do not have, none of them a value that a shortcut might hard-code
ODD = {
    "odd aimv2": tiny_config(
        "aimv2",
        vision={
            "norm_eps": 0.1, "rope_theta": 50.0, "qkv_bias": True, "use_bias": True, "full_attention_layers": (1,),
            "hidden_act": "gelu",
        },
        text={"norm_eps": 0.3, "rope_theta": 30.0, "attention_bias": True, "tie_word_embeddings": False},
    ),
    "odd siglip2": tiny_config("siglip2", vision={"norm_eps": 0.1, "rope_theta": 50.0, "table_interpolation": "one_dim"}),
}  # fmt: skip


@dataclass(frozen=True)
class GoldenSet:
    """A prompt with its images for a bundle, and the float arrays, canvases and grids that `probe` must find."""

    bundle: Bundle
    input_ids: np.ndarray
    images: list[np.ndarray]
    expected: dict[str, np.ndarray]
    greedy_ids: np.ndarray | None = None


@functools.cache
def golden_set(name: str) -> GoldenSet:
    return odd_set(ODD[name]) if name in ODD else stored_set(name)


def stored_set(name: str) -> GoldenSet:
    meta = json.loads((GOLDEN / name / "meta.json").read_text())
    golden = dict(np.load(GOLDEN / name / "golden.npz"))
    bundle = avl.load(GOLDEN / name, image_token_id=meta["tokens"]["vision_pad"], max_size=meta["max_size"])
    images = [golden.pop(f"image_{i}") for i in range(meta["n_images"])]
    ids, greedy = golden.pop("input_ids"), golden.pop("greedy_ids")
    del golden["image_flags"], golden["greedy_gaps"]
    return GoldenSet(bundle, ids, images, golden, greedy)


def odd_set(config: AndesVLConfig) -> GoldenSet:
    """Two pictures between text for a random network of any configuration; expected values by `reference.activations`."""
    processor = ImageProcessor(config.vision.patch_size, config.vision.merge_size)
    bundle = Bundle(config, tiny_params(config), None, processor)
    rng = np.random.default_rng(0)
    base = processor.base
    images = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((3 * base + 1, 4 * base - 1, 3), (base - 1, 5 * base, 3))]
    canvases = {f"canvas_{i}": to_canvas(image, processor) for i, image in enumerate(images)}
    ids = list(rng.integers(0, config.image_token_id, 4))
    for canvas in canvases.values():
        tokens = canvas.shape[0] * canvas.shape[1] // base**2
        ids += [config.image_token_id] * tokens + list(rng.integers(0, config.image_token_id, 5))
    tensors = params_to_hf(bundle.params, config)
    expected = activations(config, tensors, ids, list(canvases.values()), processor.mean, processor.std)
    return GoldenSet(bundle, np.array(ids), images, canvases | expected)


def deviations(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Name -> max_relative, infinite where shapes or names differ; canvases and grids must be exact, others within TOLERANCE."""
    out = {}
    for name in sorted(set(found) | set(expected)):
        pair = found.get(name), expected.get(name)
        same = all(x is not None for x in pair) and np.shape(pair[0]) == np.shape(pair[1])
        out[name] = max_relative(*pair) if same else float("inf")
    return {k: d for k, d in out.items() if not d <= (0.0 if k.startswith(("canvas_", "grid_hw")) else TOLERANCE)}
