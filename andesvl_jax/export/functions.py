"""The three functions that leave the house, `encode_images`, `prefill` and `decode`, with static shapes and named arrays.

They call the network as it is; only their boundary is flat: dicts of arrays, which every runtime can name.
One batch row. T tokens, P patches, M visual tokens, D decoder width, K kv heads, H head width, L layers, C cache slots,
V vocabulary.
"""

from dataclasses import dataclass
from typing import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from andesvl_jax.cache.kv import Cache, append_run
from andesvl_jax.config import AndesVLConfig
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.packing import MERGED, Batch, ImageRow
from andesvl_jax.model.andesvl import AndesVL, embed_inputs, encode_images, unstack_layers
from andesvl_jax.model.attention import Place
from andesvl_jax.model.decoder import decode, logits
from andesvl_jax.weights import path_name

Arrays = Mapping[str, jax.Array]
Specs = dict[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class ExportShapes:
    """Static sizes: one `encode_images_<P>` per entry of `patches`, one `prefill_<T>` per entry of `prompt`, C = `slots`.

    A prompt longer than the largest T is prefilled in pieces of T; prompt, its padding and the answer share the slots.
    """

    patches: tuple[int, ...] = (256,)
    prompt: tuple[int, ...] = (128,)
    slots: int = 512

    def __post_init__(self):
        for name in ("patches", "prompt"):
            sizes = getattr(self, name)
            if not sizes or min(sizes) < 1 or len(set(sizes)) != len(sizes):
                raise UserError(f"export shapes: {name} is {sizes}, expected one or more different positive sizes.")
        odd = next((p for p in self.patches if p % MERGED), None)
        if odd is not None:
            raise UserError(f"export shapes: a patches size is {odd}, expected a multiple of {MERGED} (a visual token).")
        if self.slots <= max(self.prompt):
            raise UserError(f"export shapes: slots is {self.slots}, expected more than the largest prompt, {max(self.prompt)}.")

    @property
    def visual_tokens(self) -> int:
        """M, rows of `visual` that a prefill takes."""
        return max(self.patches) // MERGED


@dataclass(frozen=True)
class Stage:
    """One function to export: call(weights, cache, inputs) -> outputs, all dicts of arrays; `cache` may be donated."""

    name: str
    call: Callable[[Arrays, Arrays, Arrays], dict[str, jax.Array]]
    weights: dict[str, jax.Array]
    cache: Specs
    inputs: Specs


def stages(params: AndesVL, config: AndesVLConfig, shapes: ExportShapes) -> list[Stage]:
    """Every function of an export, encoders first.

    encode_images_<P>: patches, coordinates, grids, image_segments -> visual [1, P/4, D].
    prefill_<T>: tokens, positions, visual_index [1, T], visual [1, M, D], cursor [] -> logits [1, V] after the last token.
    decode: tokens, positions [1, 1], cursor [] -> logits [1, V].
    Prefill and decode also take and return the cache: cache_keys, cache_values [L, 1, K, C, H], cache_positions [L, 1, K, C]
    (-1 = empty); they write their T tokens from slot `cursor` on. Positions are -1 at padding.
    Weights are named by their path in the unrolled parameter tree ("decoder.layers.0.q").
    """
    if shapes.slots > config.text.max_position_embeddings:
        limit = config.text.max_position_embeddings
        raise UserError(f"export shapes: slots is {shapes.slots}, expected at most {limit} (max_position_embeddings).")
    params, config = unstack_layers(params, config)
    config = config.replace(remat="none", attention="einsum")  # no loops for the converters
    seeing = params.replace(decoder=None)
    speaking = params.replace(vision=None, projector=None)
    encoders = [_encoder(seeing, config, p) for p in shapes.patches]
    prefills = [_decoder(f"prefill_{t}", speaking, config, t, shapes.slots, shapes.visual_tokens) for t in shapes.prompt]
    return [*encoders, *prefills, _decoder("decode", speaking, config, 1, shapes.slots, None)]


def _encoder(params: AndesVL, config: AndesVLConfig, patches: int) -> Stage:
    weights, restore = flatten(params)

    def call(weights: Arrays, cache: Arrays, inputs: Arrays):
        row = ImageRow(inputs["patches"], inputs["coordinates"], inputs["grids"], inputs["image_segments"])
        return {"visual": encode_images(restore(weights), config, row)}

    pair = jax.ShapeDtypeStruct((1, patches, 2), jnp.int32)
    inputs = {
        "patches": jax.ShapeDtypeStruct((1, patches, config.vision.patch_features), jnp.float32),
        "coordinates": pair, "grids": pair, "image_segments": jax.ShapeDtypeStruct((1, patches), jnp.int32),
    }  # fmt: skip
    return Stage(f"encode_images_{patches}", call, weights, {}, inputs)


def _decoder(name: str, params: AndesVL, config: AndesVLConfig, tokens: int, slots: int, visual_tokens: int | None) -> Stage:
    weights, restore = flatten(params)

    def call(weights: Arrays, cache: Arrays, inputs: Arrays):
        params, positions = restore(weights), inputs["positions"]
        x = embed_inputs(params, config, inputs["tokens"], inputs.get("visual"), inputs.get("visual_index"))
        slots = cache["cache_positions"]
        # the caller tracks positions and needs no modality, so that both are constants here
        kv = Cache(
            cache["cache_keys"],
            cache["cache_values"],
            slots,
            jnp.zeros_like(slots, jnp.int8),
            jnp.zeros(1, jnp.int32),
        )
        decoded = decode(params.decoder, config, x, Place(positions), kv)
        hidden = decoded.hidden
        kv = append_run(kv, decoded.new_kv, inputs["cursor"], positions, jnp.zeros_like(positions))
        if tokens > 1:
            last = jnp.sum(positions >= 0, axis=1) - 1
            hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        outputs = {"logits": logits(params.decoder, hidden[:, 0])}
        return outputs | {"cache_keys": kv.keys, "cache_values": kv.values, "cache_positions": kv.positions}

    row = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    inputs = {"tokens": row, "positions": row, "cursor": jax.ShapeDtypeStruct((), jnp.int32)}
    if visual_tokens is not None:
        visual = jax.ShapeDtypeStruct((1, visual_tokens, config.text.hidden_size), jnp.dtype(config.dtype))
        inputs |= {"visual": visual, "visual_index": row}
    return Stage(name, call, weights, _cache_specs(config, slots), inputs)


def _cache_specs(config: AndesVLConfig, slots: int) -> Specs:
    text = config.text
    shape = (text.num_layers, 1, text.num_kv_heads, slots)
    keys = jax.ShapeDtypeStruct((*shape, text.head_dim), jnp.dtype(config.dtype))
    return {"cache_keys": keys, "cache_values": keys, "cache_positions": jax.ShapeDtypeStruct(shape, jnp.int32)}


def flatten(params) -> tuple[dict[str, jax.Array], Callable[[Arrays], AndesVL]]:
    """A parameter tree as {"decoder.layers.0.q": array, ...} and the function that makes it a tree again."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [path_name(path) for path, _ in leaves]
    return dict(zip(names, (x for _, x in leaves), strict=True)), lambda flat: tree.unflatten([flat[n] for n in names])


def prompt_arrays(batch: Batch) -> dict[str, np.ndarray]:
    """What a runner reads: the one row of a prompt batch (`assemble_prompts`) under the names of the exported inputs.

    Raises UserError for more than one row.
    """
    if len(batch.tokens) != 1:
        raise UserError(f"the prompt batch has {len(batch.tokens)} rows, expected 1.")
    arrays = {"tokens": batch.tokens, "positions": batch.positions, "visual_index": batch.visual_index}
    if batch.images is None:
        return arrays
    images = batch.images
    return arrays | {
        "patches": images.patches, "coordinates": images.coordinates, "grids": images.grids, "image_segments": images.segments,
    }  # fmt: skip
