"""2x2 merge and two-layer MLP from the vision width to the decoder width.

B batch rows, P patches, C vision width, D decoder width.
"""

import jax
from flax import struct

from andesvl_jax.config import AndesVLConfig
from andesvl_jax.model.layers import activation
from andesvl_jax.weights import Leaf, Param, apply


@struct.dataclass
class Projector:
    fc1: Leaf  # [4C, 4C]
    fc1_bias: Leaf
    fc2: Leaf  # [4C, D]
    fc2_bias: Leaf


def describe_projector(config: AndesVLConfig) -> Projector:
    wide, d = config.vision.hidden_size * config.vision.merge_size**2, config.text.hidden_size
    return Projector(
        fc1=Param((wide, wide), ("merged", "mlp")), fc1_bias=Param((wide,), ("mlp",), "zeros"),
        fc2=Param((wide, d), ("mlp", "embed")), fc2_bias=Param((d,), ("embed",), "zeros"),
    )  # fmt: skip


def project(params: Projector, config: AndesVLConfig, x: jax.Array) -> jax.Array:
    """[B, P, C] in 2x2 block order -> visual tokens [B, P/4, D]; exact (erf) GELU, no norm in front."""
    b, p, c = x.shape
    merged = config.vision.merge_size**2
    x = x.reshape(b, p // merged, merged * c)
    return apply(params.fc2, activation("gelu")(apply(params.fc1, x, params.fc1_bias)), params.fc2_bias)
