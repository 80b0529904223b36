"""The whole network: images to visual tokens, visual tokens into the text, decoder.

B batch rows, T tokens, P patches, D decoder width, V vocabulary. All functions are pure: (params, config, ...) -> values.
"""

import jax
import jax.numpy as jnp
from flax import struct

from andesvl_jax.config import AndesVLConfig
from andesvl_jax.inputs.packing import Batch, ImageRow
from andesvl_jax.model import decoder as decoder_lib
from andesvl_jax.model.attention import Place
from andesvl_jax.model.decoder import Decoder, describe_decoder, embed_tokens
from andesvl_jax.model.projector import Projector, describe_projector, project
from andesvl_jax.model.vision import Vision, describe_vision, embed_patches, encode
from andesvl_jax.weights import is_leaf, stream_matrix, stream_table


@struct.dataclass
class AndesVL:
    vision: Vision
    projector: Projector
    decoder: Decoder


def describe(config: AndesVLConfig) -> AndesVL:
    """The one list of parameters: a tree of `Param`."""
    return AndesVL(describe_vision(config.vision), describe_projector(config), describe_decoder(config.text))


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
    placed = jnp.take_along_axis(visual, jnp.maximum(visual_index, 0)[..., None], axis=1)
    return jnp.where((visual_index >= 0)[..., None], placed.astype(x.dtype), x)


def forward(params: AndesVL, config: AndesVLConfig, batch: Batch) -> jax.Array:
    """Hidden states [B, T, D] after the final norm, for packed rows."""
    visual = None if batch.images is None else encode_images(params, config, batch.images)
    x = embed_inputs(params, config, batch.tokens, visual, batch.visual_index)
    hidden, _, _ = decoder_lib.decode(params.decoder, config, x, Place(batch.positions, batch.segments))
    return hidden


def unstack_layers(params: AndesVL) -> AndesVL:
    """Stacked layers [L, ...] -> tuples of layers: the same network, unrolled (decoding on CPU, export)."""

    def split(layers):
        if isinstance(layers, tuple):
            return layers
        count = jax.tree.leaves(layers)[0].shape[0]
        return tuple(jax.tree.map(lambda a, i=i: a[i], layers) for i in range(count))

    return params.replace(
        vision=params.vision.replace(layers=split(params.vision.layers)),
        decoder=params.decoder.replace(layers=split(params.decoder.layers)),
    )


def for_decoding(params: AndesVL, dtype: str | None = None) -> AndesVL:
    """The representation that decodes fastest here: on CPU the layers unrolled (a scan would copy each one's weights) and the
    decoder's matrices and tables `Streamed`, held in `dtype` (None: as they are), as are 16-bit matrices of the other parts;
    elsewhere the parameters as they are."""
    if jax.default_backend() != "cpu":
        return params
    params = unstack_layers(params)
    vision, projector, decoder = params.vision, params.projector, params.decoder
    stream = lambda tree, dtype=dtype: jax.tree.map(lambda w: stream_matrix(w, dtype), tree, is_leaf=is_leaf)  # noqa: E731
    if vision.patch.dtype.itemsize < 4:
        vision, projector = vision.replace(layers=stream(vision.layers, None)), stream(projector, None)
    decoder = decoder.replace(
        embedding=stream_table(decoder.embedding, dtype), layers=stream(decoder.layers), head=stream_table(decoder.head, dtype)
    )
    return params.replace(vision=vision, projector=projector, decoder=decoder)
