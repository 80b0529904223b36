"""Flash attention on TPU: JAX's Pallas kernel "splash", row by row and head by head, on a mesh each device on its own ones.

B batch rows, T tokens, N query heads, K kv heads, H head width.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from andesvl_jax.model.context import all_tokens, attend_in_parts, blocks, cut
from andesvl_jax.model.devices import HEAD_AXES
from andesvl_jax.weights import CONTEXT

LANES = 128  # blocks are multiples of it
LARGEST_BLOCK = 512  # queries and keys of a block; what MaxText trains with


def splash(q, k, v, segments, causal: bool, interpret: bool = False) -> jax.Array:
    """Attention of tokens to those of their own segment with scale H^-0.5; neither pass holds T x T scores.

    Args:
      q: [B, T, N, H]; k, v: [B, K, T, H]; segments: int32 [B, T], padding is a segment like any other. T may be any length: the
        row is padded to whole blocks, on a mesh with `context` each of its parts.
      causal: a token sees no slot behind its own, so a segment's tokens have to stand in order.
      interpret: run the kernel's program without a TPU (tests).
    Returns:
      [B, T, N, H] in q's dtype. Scores and softmax are float32.
    Raises:
      UserError: as `attend_in_parts`.
    """
    mesh, parts = jax.sharding.get_abstract_mesh(), blocks()
    own_heads = q.shape[2] // math.prod(mesh.shape[axis] for axis in cut(HEAD_AXES, q.shape[2]))
    attention = _kernel(q.shape[1] // parts, own_heads, parts, causal, interpret)
    if mesh.size <= 1:
        return _rows(q, k, v, segments, attention)
    by_queries = attention.manual_sharding_spec(NamedSharding(mesh, P(None, CONTEXT if causal and parts > 1 else None)))
    return attend_in_parts(_rows, q, k, v, segments, (attention,), (by_queries,))


def _block(tokens: int) -> int:
    """The size of a block of a part of so many tokens: at most 127 of padding in each."""
    return LANES * math.ceil(tokens / math.ceil(tokens / LARGEST_BLOCK) / LANES)


def _kernel(tokens: int, heads: int, parts: int, causal: bool, interpret: bool) -> kernel.SplashAttentionKernel:
    """Attention of a row in parts of so many tokens. A causal mask is that of the whole row, to be cut by queries."""
    block = _block(tokens)
    own = block * math.ceil(tokens / block)
    whole = own * parts
    mask = masks.CausalMask((whole, whole)) if causal else masks.FullMask((own, whole))
    return kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=parts if causal else 1, interpret=interpret,
        block_sizes=kernel.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
    )  # fmt: skip


def _rows(q, k, v, segments, attention: kernel.SplashAttentionKernel) -> jax.Array:
    """Own queries over the keys of the whole row, each part of it padded alike, so that slots stay in order."""
    _, t, _, h = q.shape
    pad = -t % _block(t)
    q = jnp.swapaxes(q * h**-0.5, 1, 2)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (q, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, pad)), constant_values=-1)

    def row(q, k, v, own, others):
        return attention(q, k, v, segment_ids=kernel.SegmentIds(own, others))

    out = jax.vmap(row)(q, all_tokens(k, 2), all_tokens(v, 2), segments, all_tokens(segments))
    return jnp.swapaxes(out[:, :, :t], 1, 2)
