"""Applies an eviction policy to every layer of a prefilled cache.

L layers, B batch rows, N query heads, K kv heads, G = N / K, C cache slots, H head width, W observed queries, D width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from andesvl_jax.cache.eviction import Eviction, LayerView, kept_slots
from andesvl_jax.cache.kv import Cache, select
from andesvl_jax.config import AndesVLConfig
from andesvl_jax.model.attention import Part, Place, attention_weights
from andesvl_jax.model.decoder import Decoder, DecoderLayer, LayerValues
from andesvl_jax.model.layers import layer_loop
from andesvl_jax.weights import dense


def last_queries(length: jax.Array, window: int) -> Callable[[LayerValues], jax.Array]:
    """A tap: the queries [B, W, N, H] of the last W tokens of each row, earliest first; length: int32 [B]."""
    index = jnp.maximum(length[:, None] - window + jnp.arange(window), 0)

    def tap(values: LayerValues) -> jax.Array:
        return jnp.take_along_axis(values.queries, index[:, :, None, None], axis=1)

    return tap


def compact(params: Decoder, config: AndesVLConfig, cache: Cache, queries, eviction: Eviction) -> Cache:
    """The cache with what `eviction` keeps of it.

    Args:
      queries: [L, B, W, N, H], what the tap `last_queries` gave for each row's last W tokens.
    """
    n, k, h = config.text.num_heads, config.text.num_kv_heads, config.text.head_dim
    place = cache.length[:, None] - eviction.window + jnp.arange(eviction.window)
    place = jnp.where(place >= 0, place, -1)  # rows shorter than the window have fewer queries

    def output_gram(p: DecoderLayer):
        output = dense(p.o, jnp.float32).reshape(k, n // k, h, -1)
        return jnp.einsum("kghd,kgid->kghi", output, output)

    def layer(carry, p: DecoderLayer, extra):
        keys, values, positions, queries = extra
        weights = attention_weights(queries, Part(keys, values, Place(positions)), Place(place), causal=True)
        seen = jnp.swapaxes(weights, 2, 3) * (place >= 0)[:, None, None, :, None]
        view = LayerView(keys, values, positions, seen, place, output_gram(p) if eviction.needs_output else None)
        return carry, kept_slots(view, cache.length, eviction)

    per_layer = cache.keys, cache.values, cache.positions, queries
    _, index = layer_loop(layer, None, params.layers, per_layer, config.layer_loop)
    return select(cache, index)
