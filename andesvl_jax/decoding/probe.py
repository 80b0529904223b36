"""Every intermediate value of one forward pass, in natural shapes, for parity and ablation."""

import functools
from typing import Sequence

import jax
import numpy as np

from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.config import AndesVLConfig
from andesvl_jax.decoding.api import prompt_sample
from andesvl_jax.inputs.image import ImageSource, prepare_image
from andesvl_jax.inputs.packing import Batch, assemble_prompts
from andesvl_jax.model.andesvl import AndesVL, embed_inputs
from andesvl_jax.model.attention import Place
from andesvl_jax.model.decoder import decode, logits
from andesvl_jax.model.projector import project
from andesvl_jax.model.vision import embed_patches, encode


def probe(bundle: Bundle, input_ids: Sequence[int], images: Sequence[ImageSource] = ()) -> dict[str, np.ndarray]:
    """Activations of one prompt, unpadded.

    Returns:
      canvas_0.. uint8 [H, W, 3]; grid_hw int32 [I, 2]; float32: flat_patches [P, 3pp], patch_embeds [P, C] (with position
      embedding), vit_embeds [P, C], proj_embeds [P/4, D], inputs_embeds [T, D], final_hidden [T, D] (after the final norm),
      logits [T, V]. Without images the vision entries are absent.
    """
    prepared = [prepare_image(image, bundle.image_processor) for image in images]
    sample = prompt_sample(bundle, input_ids, prepared)
    out = {f"canvas_{i}": p.canvas for i, p in enumerate(prepared)}
    if prepared:
        out["flat_patches"] = np.concatenate([p.patches for p in prepared])
        out["grid_hw"] = np.array([p.grid for p in prepared], np.int32)
    batch = assemble_prompts([sample], bundle.config.vision.patch_features)
    patches, tokens = sample.patches, len(sample.tokens)
    lengths = {"patch_embeds": patches, "vit_embeds": patches, "proj_embeds": patches // 4}
    for name, value in _activations(bundle.params, bundle.config, batch).items():
        out[name] = np.asarray(value[0, : lengths.get(name, tokens)], np.float32)
    return out


@functools.partial(jax.jit, static_argnames=("config",))
def _activations(params: AndesVL, config: AndesVLConfig, batch: Batch) -> dict[str, jax.Array]:
    out, visual, images = {}, None, batch.images
    if images is not None:
        out["patch_embeds"] = embed_patches(params.vision, config, images.patches, images.coordinates, images.grids)
        out["vit_embeds"] = encode(params.vision, config, out["patch_embeds"], images.coordinates, images.segments)
        visual = out["proj_embeds"] = project(params.projector, config, out["vit_embeds"])
    out["inputs_embeds"] = embed_inputs(params, config, batch.tokens, visual, batch.visual_index)
    place = Place(batch.positions, batch.segments)
    out["final_hidden"] = decode(params.decoder, config, out["inputs_embeds"], place, keep_kv=False).hidden
    out["logits"] = logits(params.decoder, out["final_hidden"])
    return out
