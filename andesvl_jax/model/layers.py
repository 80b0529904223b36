"""Norms, rotary embeddings and the loop over layers, shared by the encoder and the decoder.

B batch rows, T tokens, N heads, H head width, L layers.
"""

from typing import Any, Callable

import jax
import jax.numpy as jnp

from andesvl_jax.errors import UserError


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., D]: x / rms(x) in float32, cast to x's dtype, then times weight [D] (Qwen3, AIMv2)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)
    return x32.astype(x.dtype) * weight.astype(x.dtype)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """x [..., D]: standard layer norm with statistics in float32 (SigLIP2)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, -1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)
    return (x32 * weight + bias).astype(x.dtype)


def inverse_frequencies(width: int, theta: float) -> jax.Array:
    """theta^(-2k / width) for k = 0 .. width/2 - 1, float32 [width / 2]."""
    return theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)


def rotation(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, T, 1, H], of angles [B, T, H/2] for both halves: computed once, used by every layer."""
    angles = jnp.concatenate([angles, angles], -1)[:, :, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Half-split RoPE on x [B, T, N, H] in float32, returned in x's dtype."""
    cos, sin = rotation
    x32 = x.astype(jnp.float32)
    first, second = jnp.split(x32, 2, axis=-1)
    return (x32 * cos + jnp.concatenate([-second, first], -1) * sin).astype(x.dtype)


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    return {
        "silu": jax.nn.silu,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    }[name]


def layer_loop(body: Callable, carry: Any, layers: Any, per_layer: Any, loop: str, remat: str = "none") -> tuple[Any, Any]:
    """Runs carry, out = body(carry, layer, extra) over the layers and stacks what comes out.

    Args:
      layers: a pytree stacked [L, ...] to scan, a tuple of per-layer pytrees to unroll.
      per_layer: a pytree of arrays [L, ...]; NumPy arrays stay known numbers where the loop is unrolled.
      loop: "scan" compiles one body, for training; "unroll" slices no stacked weights in memory, for decoding on CPU and export.
      remat: what the backward pass recomputes, as in the config.
    Raises:
      UserError: layers of the other form.
    """
    check_layers(layers, loop)
    if remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
        body = jax.checkpoint(body, policy=policy)
    if loop == "scan":
        return jax.lax.scan(lambda c, xs: body(c, *xs), carry, (layers, per_layer))
    outs = []
    for i, layer in enumerate(layers):
        carry, out = body(carry, layer, jax.tree.map(lambda a, i=i: a[i], per_layer))
        outs.append(out)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def check_layers(layers: Any, loop: str) -> None:
    """Raises UserError where `layers` are not in the form that `loop` runs over."""
    found = "unroll" if type(layers) is tuple else "scan"
    if found != loop:
        form = {"scan": "stacked layers", "unroll": "a tuple of layers"}
        raise UserError(f"config field layer_loop is {loop!r}, which takes {form[loop]}; found {form[found]}.")
