"""Applies an eviction policy to every layer of a prefilled cache.

L layers, B batch rows, N query heads, K kv heads, G = N / K, C cache slots, H head width, W observed queries, D width.
"""

import jax.numpy as jnp

from andesvl_jax.cache.eviction import Eviction, LayerView, evict_layer
from andesvl_jax.cache.kv import Cache
from andesvl_jax.config import AndesVLConfig
from andesvl_jax.model.attention import Place, attention_weights
from andesvl_jax.model.decoder import Decoder, DecoderLayer
from andesvl_jax.model.layers import layer_loop
from andesvl_jax.weights import dense


def compact(params: Decoder, config: AndesVLConfig, cache: Cache, queries, eviction: Eviction) -> Cache:
    """The cache with what `eviction` keeps of it, before further tokens are written.

    Args:
      queries: [L, B, W, N, H], the rotated queries of each row's last W tokens, earliest first.
    """
    n, k, h = config.text.num_heads, config.text.num_kv_heads, config.text.head_dim
    place = cache.length[:, None] - eviction.window + jnp.arange(eviction.window)
    place = jnp.where(place >= 0, place, -1)  # rows shorter than the window have fewer queries

    def output_gram(p: DecoderLayer):
        output = dense(p.o, jnp.float32).reshape(k, n // k, h, -1)
        return jnp.einsum("kghd,kgid->kghi", output, output)

    def layer(carry, p: DecoderLayer, extra):
        keys, values, positions, queries = extra
        weights = jnp.swapaxes(attention_weights(queries, keys, Place(place), Place(positions), causal=True), 2, 3)
        seen = weights * (place >= 0)[:, None, None, :, None]
        view = LayerView(keys, values, positions, seen, place, output_gram(p) if eviction.needs_output else None)
        return carry, evict_layer(view, cache.length, eviction)

    _, (keys, values, positions) = layer_loop(layer, None, params.layers, (cache.keys, cache.values, cache.positions, queries))
    return Cache(keys, values, positions, cache.length, jnp.asarray(keys.shape[3], jnp.int32))
