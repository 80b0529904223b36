"""The Qwen3 decoder: pre-norm, grouped-query attention with q/k norm per head, half-split RoPE, SwiGLU.

B batch rows, T tokens, D width, N query heads, K kv heads, H head width, F mlp width, V vocabulary, L layers, C cache slots.
"""

import jax
import jax.numpy as jnp
from flax import struct

from andesvl_jax.cache.kv import Cache, reserve
from andesvl_jax.config import AndesVLConfig, TextConfig
from andesvl_jax.model.attention import Place, attend, attend_cache
from andesvl_jax.model.layers import inverse_frequencies, layer_loop, rms_norm, rotate, rotation
from andesvl_jax.weights import Leaf, Param, apply, embed, unembed


@struct.dataclass
class DecoderLayer:
    """q: [D, N H]; k, v: [D, K H]; o: [N H, D]; gate, up: [D, F]; down: [F, D]; norms [D], q/k norm [H]."""

    attention_norm: Leaf
    q: Leaf
    k: Leaf
    v: Leaf
    q_bias: Leaf | None
    k_bias: Leaf | None
    v_bias: Leaf | None
    q_norm: Leaf | None
    k_norm: Leaf | None
    o: Leaf
    o_bias: Leaf | None
    mlp_norm: Leaf
    gate: Leaf
    up: Leaf
    down: Leaf


@struct.dataclass
class Decoder:
    embedding: Leaf  # [V, D]
    layers: DecoderLayer  # stacked [L, ...]
    norm: Leaf  # [D]
    head: Leaf | None  # [V, D]; None when tied to the embedding


def describe_decoder(config: TextConfig) -> Decoder:
    d, f, n_layers, h = config.hidden_size, config.intermediate_size, config.num_layers, config.head_dim
    wide, narrow = config.num_heads * h, config.num_kv_heads * h

    def matrix(i: int, o: int, *axes: str, init="normal") -> Param:
        return Param((n_layers, i, o), ("layers", *axes), init)

    def vector(width: int, axis: str, init="ones", present: bool = True) -> Param | None:
        return Param((n_layers, width), ("layers", axis), init) if present else None

    bias = config.attention_bias
    layers = DecoderLayer(
        attention_norm=vector(d, "embed"),
        q=matrix(d, wide, "embed", "heads"), k=matrix(d, narrow, "embed", "kv_heads"), v=matrix(d, narrow, "embed", "kv_heads"),
        q_bias=vector(wide, "heads", "zeros", bias), k_bias=vector(narrow, "kv_heads", "zeros", bias),
        v_bias=vector(narrow, "kv_heads", "zeros", bias),
        q_norm=vector(h, "head_dim", present=config.qk_norm), k_norm=vector(h, "head_dim", present=config.qk_norm),
        o=matrix(wide, d, "heads", "embed", init="residual"), o_bias=vector(d, "embed", "zeros", bias),
        mlp_norm=vector(d, "embed"),
        gate=matrix(d, f, "embed", "mlp"), up=matrix(d, f, "embed", "mlp"), down=matrix(f, d, "mlp", "embed", init="residual"),
    )  # fmt: skip
    table = Param((config.vocab_size, d), ("vocab", "embed"), "table")
    return Decoder(table, layers, Param((d,), ("embed",), "ones"), None if config.tie_word_embeddings else table)


def embed_tokens(params: Decoder, config: AndesVLConfig, tokens) -> jax.Array:
    """int32 [B, T] -> [B, T, D]."""
    return embed(params.embedding, tokens, jnp.dtype(config.dtype))


def logits(params: Decoder, hidden: jax.Array) -> jax.Array:
    """[..., D] after the final norm -> float32 [..., V]."""
    return unembed(params.embedding if params.head is None else params.head, hidden)


def decode(
    params: Decoder,
    config: AndesVLConfig,
    x,
    place: Place,
    cache: Cache | None = None,
    observe: jax.Array | None = None,
    fresh: bool = False,
) -> tuple[jax.Array, Cache | None, jax.Array | None]:
    """All layers over x [B, T, D].

    Args:
      place: where the tokens stand. Without a cache they see each other, segment by segment; with one they are written
        to its next T slots first and see every slot whose position is theirs or earlier.
      fresh: the cache is empty, so that the tokens see each other and it is only written.
      observe: int32 [B, W] slots of x whose queries eviction policies want to see, or None.
    Returns:
      hidden [B, T, D] after the final norm; the cache with T more tokens (or None); the observed, rotated queries
      [L, B, W, N, H] (or None).
    Raises:
      ValueError: segments together with a cache, which holds one conversation per row.
    """
    if cache is not None and place.segments is not None:
        raise ValueError("a cache holds one conversation per row, expected Place(positions) without segments")
    text = config.text
    b, t, _ = x.shape
    h = text.head_dim
    turn = rotation(place.positions[..., None].astype(jnp.float32) * inverse_frequencies(h, text.rope_theta))
    start = None if cache is None else cache.cursor
    if cache is not None:
        cache = reserve(cache, place.positions)

    def heads(y, w, bias, norm):
        y = apply(w, y, bias).reshape(b, t, -1, h)
        return y if norm is None else rms_norm(y, norm, text.norm_eps)

    def layer(carry, p: DecoderLayer, extra):
        x, keys, values = carry
        y = rms_norm(x, p.attention_norm, text.norm_eps)
        q = rotate(heads(y, p.q, p.q_bias, p.q_norm), turn)
        k = jnp.swapaxes(rotate(heads(y, p.k, p.k_bias, p.k_norm), turn), 1, 2)
        v = jnp.swapaxes(heads(y, p.v, p.v_bias, None), 1, 2)
        if cache is not None:
            keys = jax.lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), (extra, 0, 0, start, 0))
            values = jax.lax.dynamic_update_slice(values, v[None].astype(values.dtype), (extra, 0, 0, start, 0))
        if cache is None or fresh:
            y = attend(q, k, v, place, place, True, config.attention, config.attention_chunk)
        else:
            held = cache.replace(keys=keys, values=values)
            y = attend_cache(q, held, extra, place.positions, config.attention, config.attention_chunk)
        x = x + apply(p.o, y.reshape(b, t, -1), p.o_bias)
        y = rms_norm(x, p.mlp_norm, text.norm_eps)
        x = x + apply(p.down, jax.nn.silu(apply(p.gate, y)) * apply(p.up, y))
        observed = None if observe is None else jnp.take_along_axis(q, observe[:, :, None, None], axis=1)
        return (x, keys, values), observed

    carry = (x, None, None) if cache is None else (x, cache.keys, cache.values)
    per_layer = None if cache is None else jnp.arange(text.num_layers)
    (x, keys, values), observed = layer_loop(layer, carry, params.layers, per_layer, config.remat)
    if cache is not None:
        cache = cache.replace(keys=keys, values=values)
    return rms_norm(x, params.norm, text.norm_eps), cache, observed
