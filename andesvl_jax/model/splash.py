"""Flash attention on TPU: JAX's Pallas kernel "splash", row by row and head by head, on a mesh each device on its own ones.

B batch rows, T tokens, N query heads, K kv heads, H head width.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from andesvl_jax.model.devices import HEAD_AXES, ROW_AXES

LANES = 128  # blocks are multiples of it
LARGEST_BLOCK = 512  # queries and keys of a block; what MaxText trains with


def splash(q, k, v, segments, causal: bool, interpret: bool = False) -> jax.Array:
    """Attention of tokens to those of their own segment with scale H^-0.5; neither pass holds T x T scores.

    Args:
      q: [B, T, N, H]; k, v: [B, K, T, H]; segments: int32 [B, T], padding is a segment like any other. T may be any length: the
        row is padded to whole blocks.
      causal: a token sees no slot behind its own, so a segment's tokens have to stand in order.
      interpret: run the kernel's program without a TPU (tests).
    Returns:
      [B, T, N, H] in q's dtype. Scores and softmax are float32.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return _rows(q, k, v, segments, causal, interpret)
    rows, heads = _cut(ROW_AXES, q.shape[0], mesh), _cut(HEAD_AXES, q.shape[2], mesh)
    if _cut(HEAD_AXES, k.shape[1], mesh) != heads:  # too few kv heads to deal out: each query head takes a copy of its own
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[1], axis=1) for x in (k, v))
    tokens, keys = P(rows, None, heads, None), P(rows, heads, None, None)
    return jax.shard_map(
        lambda q, k, v, segments: _rows(q, k, v, segments, causal, interpret),
        in_specs=(tokens, keys, keys, P(rows, None)), out_specs=tokens, check_vma=False,  # a kernel's outputs are not typed so
    )(q, k, v, segments)  # fmt: skip


def _cut(axes: tuple[str, ...], size: int, mesh) -> tuple[str, ...]:
    """The mesh axes that cut a dimension of this size; () where it does not divide: every device then takes all of it."""
    axes = tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
    return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()


def _rows(q, k, v, segments, causal: bool, interpret: bool) -> jax.Array:
    _, t, n, h = q.shape
    blocks = math.ceil(t / LARGEST_BLOCK)
    block = LANES * math.ceil(t / blocks / LANES)  # at most 127 tokens of padding a block
    size, pad = blocks * block, ((0, 0), (0, 0), (0, blocks * block - t), (0, 0))
    mask = (masks.CausalMask if causal else masks.FullMask)((size, size))
    attention = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * n), head_shards=1, q_seq_shards=1, interpret=interpret,
        block_sizes=kernel.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
    )  # fmt: skip
    q = jnp.swapaxes(q * h**-0.5, 1, 2)
    segments = jnp.pad(segments, ((0, 0), (0, size - t)), constant_values=-1)

    def row(q, k, v, segments):
        return attention(q, k, v, segment_ids=kernel.SegmentIds(segments, segments))

    out = jax.vmap(row)(*(jnp.pad(x, pad) for x in (q, k, v)), segments)
    return jnp.swapaxes(out[:, :, :t], 1, 2)
