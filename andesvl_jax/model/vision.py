"""The native-resolution vision encoders: AIMv2 (RMSNorm, SwiGLU) and SigLIP2 (LayerNorm, GELU), both with 2-D RoPE.

B batch rows, P patches of a row (several images, packed), C vision width, F mlp width, N heads, H head width, L layers.
Patches come in 2x2 block order: four consecutive patches are one visual token.
"""

import jax
import jax.numpy as jnp
from flax import struct

from andesvl_jax.config import AndesVLConfig, VisionConfig
from andesvl_jax.model.attention import Part, Place, attend
from andesvl_jax.model.layers import activation, inverse_frequencies, layer_loop, layer_norm, rms_norm, rotate, rotation
from andesvl_jax.model.position_table import position_embedding
from andesvl_jax.weights import Leaf, Param, apply


@struct.dataclass
class VisionLayer:
    """norm*: [C]; qkv: [C, 3C]; proj: [C, C]; fc1, fc3 (AIMv2: gate, up): [C, F]; fc2: [F, C]; biases where there are any."""

    norm1: Leaf
    norm1_bias: Leaf | None
    qkv: Leaf
    qkv_bias: Leaf | None
    proj: Leaf
    proj_bias: Leaf | None
    norm2: Leaf
    norm2_bias: Leaf | None
    fc1: Leaf
    fc1_bias: Leaf | None
    fc3: Leaf | None
    fc3_bias: Leaf | None
    fc2: Leaf
    fc2_bias: Leaf | None


@struct.dataclass
class Vision:
    patch: Leaf  # [3 p p, C], features in channel, row, column order
    patch_bias: Leaf  # [C]
    patch_norm: Leaf | None  # [C], AIMv2 only
    table: Leaf | None  # [n n, C]
    layers: VisionLayer  # stacked [L, ...]
    norm: Leaf  # [C]
    norm_bias: Leaf | None


def describe_vision(config: VisionConfig) -> Vision:
    c, f, n_layers = config.hidden_size, config.intermediate_size, config.num_layers
    aimv2 = config.family == "aimv2"

    def matrix(i: int, o: int, *axes: str, init="normal") -> Param:
        return Param((n_layers, i, o), ("layers", *axes), init)

    def vector(width: int, axis: str, init="zeros", present: bool = True) -> Param | None:
        return Param((n_layers, width), ("layers", axis), init) if present else None

    layers = VisionLayer(
        norm1=vector(c, "embed", "ones"), norm1_bias=vector(c, "embed", present=not aimv2),
        qkv=matrix(c, 3 * c, "embed", "qkv"), qkv_bias=vector(3 * c, "qkv", present=config.qkv_bias),
        proj=matrix(c, c, "heads", "embed", init="residual"), proj_bias=vector(c, "embed", present=config.use_bias),
        norm2=vector(c, "embed", "ones"), norm2_bias=vector(c, "embed", present=not aimv2),
        fc1=matrix(c, f, "embed", "mlp"), fc1_bias=vector(f, "mlp", present=config.use_bias),
        fc3=matrix(c, f, "embed", "mlp") if aimv2 else None, fc3_bias=vector(f, "mlp", present=aimv2 and config.use_bias),
        fc2=matrix(f, c, "mlp", "embed", init="residual"), fc2_bias=vector(c, "embed", present=config.use_bias),
    )  # fmt: skip
    return Vision(
        patch=Param((config.patch_features, c), ("patch", "embed")),
        patch_bias=Param((c,), ("embed",), "zeros"),
        patch_norm=Param((c,), ("embed",), "ones") if aimv2 else None,
        table=None if config.table_side is None else Param((config.table_side**2, c), ("table", "embed"), "position"),
        layers=layers,
        norm=Param((c,), ("embed",), "ones"),
        norm_bias=None if aimv2 else Param((c,), ("embed",), "zeros"),
    )


def embed_patches(params: Vision, config: AndesVLConfig, patches, coordinates, grids) -> jax.Array:
    """patches float [B, P, 3pp], coordinates and grids int32 [B, P, 2] -> [B, P, C] with position embedding."""
    vision, dtype = config.vision, jnp.dtype(config.dtype)
    x = apply(params.patch, patches.astype(dtype), params.patch_bias)
    if params.patch_norm is not None:
        x = rms_norm(x, params.patch_norm, vision.norm_eps)
    if params.table is not None:
        table = params.table.astype(dtype)
        x = x + position_embedding(table, vision.table_side, vision.table_interpolation, coordinates, grids)
    return x


def encoder_layer(
    layer: VisionLayer, config: AndesVLConfig, x: jax.Array, place: Place, rotary: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """One layer over patches [B, P, C] -> [B, P, C]; rotary: `patch_rotation` of their coordinates."""
    vision = config.vision
    b, t, c = x.shape
    act = activation(vision.hidden_act)

    def norm(x, weight, bias):
        return _norm(vision, x, weight, bias)

    y = norm(x, layer.norm1, layer.norm1_bias)
    # a shape that heads are sharded in, through q, k and v
    y = apply(layer.qkv, y, layer.qkv_bias).reshape(b, t, 3, -1, vision.head_dim)
    q, k, v = y[:, :, 0], y[:, :, 1], y[:, :, 2]
    if vision.use_rope:
        q, k = rotate(q, rotary), rotate(k, rotary)
    own = Part(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), place, own=True)
    y = attend(q, [own], place, False, config.attention, config.attention_chunk)
    x = x + apply(layer.proj, y.reshape(b, t, c), layer.proj_bias)
    y = norm(x, layer.norm2, layer.norm2_bias)
    gate = act(apply(layer.fc1, y, layer.fc1_bias))
    hidden = gate if layer.fc3 is None else gate * apply(layer.fc3, y, layer.fc3_bias)
    return x + apply(layer.fc2, hidden, layer.fc2_bias)


def patch_rotation(config: VisionConfig, coordinates) -> tuple[jax.Array, jax.Array]:
    """cos and sin of 2-D RoPE, float32 [B, P, 1, H], at coordinates int32 [B, P, 2]: row first, then column."""
    frequencies = inverse_frequencies(config.head_dim // 2, config.rope_theta)
    angles = coordinates[..., None].astype(jnp.float32) * frequencies
    return rotation(angles.reshape(*coordinates.shape[:2], config.head_dim // 2))


def encode(params: Vision, config: AndesVLConfig, x, coordinates, segments) -> jax.Array:
    """Transformer over embedded patches [B, P, C]; segments int32 [B, P] number the images, -1 is padding. -> [B, P, C]."""
    vision = config.vision
    rotary = patch_rotation(vision, coordinates)
    present = jnp.where(segments < 0, -1, 0)
    windows = _window_segments(vision, coordinates, segments)

    def body(x, layer: VisionLayer, full):
        place = Place(present, segments if windows is None else jnp.where(full, segments, windows))
        return encoder_layer(layer, config, x, place, rotary), None

    full_layers = vision.full_attention_layers
    full = jnp.array([full_layers is None or i in full_layers for i in range(vision.num_layers)])
    x, _ = layer_loop(body, x, params.layers, full, config.layer_loop, config.remat)
    return _norm(vision, x, params.norm, params.norm_bias)


def _norm(config: VisionConfig, x, weight, bias) -> jax.Array:
    if config.family == "aimv2":
        return rms_norm(x, weight, config.norm_eps)
    return layer_norm(x, weight, bias, config.norm_eps)


def _window_segments(vision: VisionConfig, coordinates, segments) -> jax.Array | None:
    """int32 [B, P] that differ between windows and images; None when every layer is full."""
    if vision.full_attention_layers is None:
        return None
    side = vision.window_size // vision.merge_size // vision.patch_size * vision.merge_size  # in patches
    window = coordinates // side
    return jnp.where(segments < 0, -1, (segments * 1024 + window[..., 0]) * 1024 + window[..., 1])
