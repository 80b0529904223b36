"""The AIMv2-L encoder beside `transformers` Aimv2VisionModel on CPU, float32: one square picture at a time.

Run: `python benchmarks/vision.py --config andesvl-1b`; `--quick` takes the position table's size and half of it.
P patches.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # beside this file, however it is run
import timing

from andesvl_jax.checkpoints.names import entries
from andesvl_jax.config import AndesVLConfig
from andesvl_jax.inputs.image import ImageProcessor, patchify
from andesvl_jax.inputs.packing import ImageRow
from andesvl_jax.model.andesvl import AndesVL, describe
from andesvl_jax.model.vision import embed_patches, encode
from andesvl_jax.weights import is_param, path_name

PIXELS = ((448, 3), (1008, 3), (1792, 1))  # side of the picture, runs of each side


def run(config_name: str = "andesvl-1b", quick: bool = False) -> dict[str, Any]:
    """Times one picture of each size on both sides in turns and returns {"name", "rows"}.

    Raises:
      UserError: PyTorch is not installed, or the configuration is unknown or has no AIMv2 encoder.
    """
    import peer  # needs PyTorch

    config = timing.config_by_name(config_name)
    shapes = {name: s for e in entries(config) if e.path.startswith("vision.") for name, s in e.shapes().items()}
    tensors = peer.random_tensors(shapes, peer.torch.float32)
    params = _params(config, tensors)
    share = timing.share_of_cores()
    side = config.vision.table_side * config.vision.patch_size
    rows = _equality_rows(peer, params, config, tensors, side)
    for pixels, runs in ((side // 2, 2), (side, 2)) if quick else PIXELS:
        rows += _speed_rows(peer, params, config, tensors, pixels, runs)
    return {"name": f"vision {config_name}", "rows": [timing.quiet_row(share), *rows]}


def _params(config: AndesVLConfig, tensors) -> AndesVL:
    """This project's encoder with unrolled layers, of HF tensors; the other parts are absent."""
    found = {e.path: e for e in entries(config)}
    flat, tree = jax.tree_util.tree_flatten_with_path(describe(config).vision, is_leaf=is_param)
    leaves = []
    for path, param in flat:
        leaf = np.empty(param.shape, np.float32)
        found[f"vision.{path_name(path)}"].fill(leaf, [(0, n) for n in param.shape], lambda name: tensors[name].numpy())
        leaves.append(jnp.asarray(leaf))
    stacked = tree.unflatten(leaves)
    layers = tuple(jax.tree.map(lambda x, i=i: x[i], stacked.layers) for i in range(config.vision.num_layers))
    return AndesVL(vision=stacked.replace(layers=layers), projector=None, decoder=None)


def _picture(config: AndesVLConfig, pixels: int) -> tuple[ImageRow, np.ndarray]:
    """Noise of pixels x pixels as this project's patches, and normalised as [1, 3, H, W]."""
    processor = ImageProcessor(config.vision.patch_size)
    canvas = np.random.default_rng(0).integers(0, 256, (pixels, pixels, 3), np.uint8)
    patches, coordinates, grid = patchify(canvas, processor)
    grids = np.broadcast_to(np.array(grid, np.int32), coordinates.shape)
    row = ImageRow(*(x[None] for x in (patches, coordinates, grids, np.zeros(len(patches), np.int32))))
    normalised = (canvas.astype(np.float32) / 255 - np.float32(processor.mean)) / np.float32(processor.std)
    return row, np.ascontiguousarray(normalised.transpose(2, 0, 1)[None])


@functools.partial(jax.jit, static_argnames="config")
def _encode(params: AndesVL, config: AndesVLConfig, images: ImageRow) -> jax.Array:
    x = embed_patches(params.vision, config, images.patches, images.coordinates, images.grids)
    return encode(params.vision, config, x, images.coordinates, images.segments)


def _equality_rows(peer, params: AndesVL, config: AndesVLConfig, tensors, pixels: int) -> list[timing.Row]:
    """Both sides on one picture whose grid is that of the position table, RoPE off here: `transformers` has none."""
    plain = config.replace(vision=dataclasses.replace(config.vision, use_rope=False))
    images, normalised = _picture(config, pixels)
    found = np.asarray(_encode(params, plain, images))[0]
    expected = peer.encode(peer.build_encoder(config.vision, tensors, pixels), normalised)[0].numpy()
    raster = images.coordinates[0] @ np.array([pixels // config.vision.patch_size, 1])
    difference = np.abs(found - expected[raster]).max()
    return [
        timing.row("largest difference, RoPE off", float(difference), "of the output"),
        timing.row("largest output, RoPE off", float(np.abs(expected).max()), "of the output"),
    ]


def _speed_rows(peer, params: AndesVL, config: AndesVLConfig, tensors, pixels: int, runs: int) -> list[timing.Row]:
    """One picture of pixels x pixels, with RoPE and a resized table here, a table of the picture's size and no RoPE there."""
    images, normalised = _picture(config, pixels)
    compiled = _encode.lower(params, config, images).compile()
    model = peer.build_encoder(config.vision, tensors, pixels)
    ours = lambda: timing.seconds(lambda: jax.block_until_ready(compiled(params, images)))  # noqa: E731
    theirs = lambda: timing.seconds(lambda: peer.encode(model, normalised))  # noqa: E731
    peer.torch.set_num_threads(timing.cores())
    if runs > 1:  # to warm up; a picture that takes minutes does not need it
        ours(), theirs()
    a, b = timing.in_turns(ours, theirs, runs=runs)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return [
        timing.row(f"picture of {pixels} x {pixels}, {images.patches.shape[1]} patches", a, "s", b, b / a),
        timing.row(f"temporary memory at {pixels} x {pixels}", temporary / 2**20, "MiB"),
    ]


if __name__ == "__main__":
    sys.exit(timing.main(run, "andesvl-1b", __doc__.splitlines()[0]))
