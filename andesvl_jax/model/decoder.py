"""The Qwen3 decoder: pre-norm, grouped-query attention with q/k norm per head, half-split RoPE, SwiGLU.

B batch rows, T tokens, D width, N query heads, K kv heads, H head width, F mlp width, V vocabulary, L layers, C cache slots.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from andesvl_jax.cache.kv import Cache, KeyValues, RaggedCache
from andesvl_jax.config import AndesVLConfig, TextConfig
from andesvl_jax.model.attention import CachePart, Part, Place, attend, cache_part, read_by_kernel
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


@struct.dataclass
class LayerValues:
    """What one layer computes.

    Attributes:
      attention_input: [B, T, D], after the attention norm.
      queries: [B, T, N, H]; keys: [B, K, T, H]; both after RoPE.
      values: [B, K, T, H].
      hidden: [B, T, D], the layer's output.
    """

    attention_input: jax.Array
    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    hidden: jax.Array


@struct.dataclass
class Decoded:
    """hidden: [B, T, D] after the final norm; new_kv: of the tokens of x, or None; taps: what `tap` made, stacked [L, ...]."""

    hidden: jax.Array
    new_kv: KeyValues | None
    taps: Any


def text_rotation(config: TextConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of RoPE, float32 [B, T, 1, H], at positions int32 [B, T]."""
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta)
    return rotation(positions[..., None].astype(jnp.float32) * frequencies)


def decoder_layer(
    layer: DecoderLayer,
    config: AndesVLConfig,
    x: jax.Array,
    place: Place,
    rotary: tuple[jax.Array, jax.Array],
    context: Sequence[Part | CachePart] = (),
    mask: jax.Array | None = None,
) -> LayerValues:
    """One layer over x [B, T, D], whose tokens attend to `context` and to each other.

    Args:
      rotary: `text_rotation` of the positions in `place`.
      context: parts in front of the tokens' own keys, such as a layer of a cache.
      mask: bool [B, T, T], which own tokens a token may see besides the order of positions; None: all.
    """
    text = config.text
    b, t, _ = x.shape

    def heads(y, w, bias, norm):
        y = apply(w, y, bias).reshape(b, t, -1, text.head_dim)
        return y if norm is None else rms_norm(y, norm, text.norm_eps)

    y = rms_norm(x, layer.attention_norm, text.norm_eps)
    q = rotate(heads(y, layer.q, layer.q_bias, layer.q_norm), rotary)
    k = jnp.swapaxes(rotate(heads(y, layer.k, layer.k_bias, layer.k_norm), rotary), 1, 2)
    v = jnp.swapaxes(heads(y, layer.v, layer.v_bias, None), 1, 2)
    parts = [*context, Part(k, v, place, mask, own=True)]
    attended = attend(q, parts, place, True, config.attention, config.attention_chunk)
    x = x + apply(layer.o, attended.reshape(b, t, -1), layer.o_bias)
    z = rms_norm(x, layer.mlp_norm, text.norm_eps)
    x = x + apply(layer.down, jax.nn.silu(apply(layer.gate, z)) * apply(layer.up, z))
    return LayerValues(y, q, k, v, x)


def decode(
    params: Decoder,
    config: AndesVLConfig,
    x,
    place: Place,
    cache: Cache | RaggedCache | None = None,
    tap: Callable[[LayerValues], Any] | None = None,
    mask: jax.Array | None = None,
    keep_kv: bool = True,
) -> Decoded:
    """All layers over x [B, T, D]. The cache is read and never written: `cache.kv.append` adds `new_kv` to it.

    Args:
      place: where the tokens stand. They see each other, segment by segment, and every slot of the cache, up to their position.
      tap: a pure function of the values of a layer, whose results are stacked.
      mask: bool [B, T, T], which own tokens a token may see besides the order of positions (ancestors in a draft tree).
      keep_kv: False leaves `new_kv` None, for training.
    Raises:
      ValueError: segments together with a cache, which holds one conversation per row; or layers with different numbers of
        slots in a scan.
    """
    if cache is not None and place.segments is not None:
        raise ValueError("a cache holds one conversation per row, expected Place(positions) without segments")
    if isinstance(cache, RaggedCache) and config.layer_loop != "unroll":
        raise ValueError("config field layer_loop is 'scan', expected 'unroll' for layers with different numbers of slots.")
    rotary = text_rotation(config.text, place.positions)
    # unrolled, XLA would cut every layer out of the cache at once: 78 ms a step for 45 at 8,192 slots
    in_turn = isinstance(cache, Cache) and config.layer_loop == "unroll"
    in_turn = in_turn and not read_by_kernel(cache, x.shape[1], config.text.head_dim)

    def body(x, layer: DecoderLayer, index):
        if in_turn:
            index = index + zeros_after(x)[0]
        context = () if cache is None else (cache_part(cache, index),)
        values = decoder_layer(layer, config, x, place, rotary, context, mask)
        kept = KeyValues(values.keys, values.values) if keep_kv else None
        return values.hidden, (kept, None if tap is None else tap(values))

    indices = None if cache is None else np.arange(config.text.num_layers, dtype=np.int32)
    remat = config.remat if cache is None else "none"  # nothing has a gradient through a cache
    x, (new_kv, taps) = layer_loop(body, x, params.layers, indices, config.layer_loop, remat)
    hidden = rms_norm(x, params.norm, config.text.norm_eps)
    if cache is not None and keep_kv:
        new_kv = new_kv.replace(after_reads=zeros_after(hidden))
    return Decoded(hidden, new_kv, taps)


def zeros_after(x: jax.Array) -> jax.Array:
    """int32 [B] zeros that XLA cannot know before x [B, T, D]; its CPU backend drops optimization barriers."""
    return jnp.floor(0.5 * jax.nn.sigmoid(x[:, 0, 0].astype(jnp.float32))).astype(jnp.int32)
