"""The whole network: images to visual tokens, visual tokens into the text, decoder.

B batch rows, T tokens, P patches, D decoder width, V vocabulary. All functions are pure: (params, config, ...) -> values.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from andesvl_jax.config import AndesVLConfig
from andesvl_jax.inputs.packing import Batch, ImageRow
from andesvl_jax.kernels import cpu
from andesvl_jax.model.attention import Place
from andesvl_jax.model.context import place_tokens
from andesvl_jax.model.decoder import Decoder, decode, describe_decoder, embed_tokens
from andesvl_jax.model.projector import Projector, describe_projector, project
from andesvl_jax.model.vision import Vision, describe_vision, embed_patches, encode
from andesvl_jax.weights import Leaf, Packed, Recipe, Streamed, is_leaf, represent, stream_matrix, stream_table


@struct.dataclass
class AndesVL:
    vision: Vision
    projector: Projector
    decoder: Decoder


def describe(config: AndesVLConfig, recipe: Recipe | None = None) -> AndesVL:
    """The one list of parameters: a tree of `Param`.

    Args:
      recipe: representations of the weights; the tree then has their leaf kinds, a `Param` in place of each array.
    """
    dense = AndesVL(describe_vision(config.vision), describe_projector(config), describe_decoder(config.text))
    return dense if recipe is None else represent(dense, recipe)


def encode_images(params: AndesVL, config: AndesVLConfig, images: ImageRow) -> jax.Array:
    """Packed patches of a batch -> visual tokens [B, P/4, D]."""
    x = embed_patches(params.vision, config, images.patches, images.coordinates, images.grids)
    x = encode(params.vision, config, x, images.coordinates, images.segments)
    return project(params.projector, config, x)


def embed_inputs(params: AndesVL, config: AndesVLConfig, tokens, visual, visual_index) -> jax.Array:
    """Token embeddings with visual tokens in their places.

    Args:
      tokens: int32 [B, T]; visual: [B, M, D] or None; visual_index: int32 [B, T], the row of `visual` that stands at this
        token, -1 for text.
    Returns:
      [B, T, D].
    """
    x = embed_tokens(params.decoder, config, tokens)
    if visual is None:
        return x
    placed = place_tokens(visual, visual_index).astype(x.dtype)
    return jnp.where((visual_index >= 0)[..., None], placed, x)


def forward(params: AndesVL, config: AndesVLConfig, batch: Batch) -> jax.Array:
    """Hidden states [B, T, D] after the final norm, for packed rows."""
    visual = None if batch.images is None else encode_images(params, config, batch.images)
    x = embed_inputs(params, config, batch.tokens, visual, batch.visual_index)
    return decode(params.decoder, config, x, Place(batch.positions, batch.segments), keep_kv=False).hidden


def unstack_layers(params: AndesVL, config: AndesVLConfig) -> tuple[AndesVL, AndesVLConfig]:
    """Parameters and config of the same network with its layers unrolled: tuples of layers (decoding on CPU, export)."""
    if config.layer_loop == "unroll":
        return params, config

    def split(layers):
        count = jax.tree.leaves(layers)[0].shape[0]
        return tuple(jax.tree.map(lambda a, i=i: a[i], layers) for i in range(count))

    unrolled = params.replace(
        vision=params.vision.replace(layers=split(params.vision.layers)),
        decoder=params.decoder.replace(layers=split(params.decoder.layers)),
    )
    return unrolled, config.replace(layer_loop="unroll")


def for_decoding(
    params: AndesVL, config: AndesVLConfig, dtype: str | None = None, donate: bool = False
) -> tuple[AndesVL, AndesVLConfig]:
    """Parameters and config in the form that decodes fastest on this backend.

    On CPU, unless some are packed, the layers are unrolled (a scan would copy each one's weights) and the decoder's matrices
    and tables are `Streamed`, as are 16-bit matrices of the other parts. Elsewhere both stay as they are. What is not laid out
    anew shares the memory of `params`. The C++ kernels are built here, at the latest.

    Args:
      dtype: of the decoder's matrices; None: their own.
      donate: frees the rest of the memory of `params` stack by stack; `params` is of no use after.
    """
    if jax.default_backend() != "cpu" or has_packed(params):
        return params, config
    vision, projector, decoder = params.vision, params.projector, params.decoder
    compiled = cpu.available()
    stream = functools.partial(stream_matrix, compiled=compiled)
    table = functools.partial(stream_table, dtype=dtype, compiled=compiled)
    half = vision.patch.dtype.itemsize < 4
    unroll = functools.partial(_unrolled, loop=config.layer_loop, donate=donate)
    vision = vision.replace(layers=unroll(vision.layers, stream if half else lambda w: w))
    if half:
        projector = jax.tree.map(stream, projector, is_leaf=is_leaf)
    layers = unroll(decoder.layers, functools.partial(stream, dtype=dtype))
    decoder = decoder.replace(embedding=table(decoder.embedding), layers=layers, head=table(decoder.head))
    return params.replace(vision=vision, projector=projector, decoder=decoder), config.replace(layer_loop="unroll")


def has_packed(params) -> bool:
    """Whether some weights are packed: XLA's CPU backend would decode all of an unrolled network at once, so it is scanned."""

    def packed(w) -> bool:
        return isinstance(w, Packed)

    return any(map(packed, jax.tree.leaves(params, is_leaf=packed)))


def _unrolled(layers, lay_out: Callable[[Leaf], Leaf], loop: str, donate: bool) -> tuple:
    """Layers in the form of `loop` -> a tuple of layers with every leaf laid out."""
    if loop == "unroll":
        return tuple(jax.tree.map(lay_out, layer, is_leaf=is_leaf) for layer in layers)
    stacks, tree = jax.tree.flatten(layers, is_leaf=is_leaf)
    columns = []
    for stack in stacks:
        columns.append(jax.block_until_ready([lay_out(w) for w in _layers_of(stack)]))
        if donate and all(isinstance(w, Streamed) for w in columns[-1]):
            jax.tree.map(lambda x: x.delete(), stack)
    return tuple(tree.unflatten(layer) for layer in zip(*columns, strict=True))


def _layers_of(stack: Leaf) -> list[Leaf]:
    arrays, tree = jax.tree.flatten(stack)
    if all(len(x.devices()) == 1 for x in arrays):  # through NumPy a layer is the same memory and no copy
        split = [[jax.device_put(x) for x in np.asarray(array)] for array in arrays]
    else:
        split = [list(array) for array in arrays]
    return [tree.unflatten(layer) for layer in zip(*split, strict=True)]
