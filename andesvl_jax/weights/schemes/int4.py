"""4-bit integers, symmetric and narrow: codes in [-7, 7], two in a byte."""

from dataclasses import dataclass

import jax.numpy as jnp

from andesvl_jax.weights.schemes.scheme import Scheme, round_symmetric


@dataclass(frozen=True)
class Int4(Scheme):
    """Stored as codes uint8 [..., n / 2], the earlier weight in the low half, and scale float32 [..., n / g]."""

    name = "int4"
    pack_multiple = 2

    def encode(self, w):
        return round_symmetric(self, w, 7)

    def pack(self, encoded):
        codes = encoded["codes"]
        pairs = codes.astype(jnp.uint8).reshape(*codes.shape[:-1], -1, 2)
        return {"codes": (pairs[..., 0] & 15) | (pairs[..., 1] << 4), "scale": encoded["scale"]}

    def unpack(self, stored, n):
        codes = stored["codes"]
        # arithmetic shift right of the int8 view sign-extends the upper half of a byte
        pairs = jnp.stack([codes << 4, codes], -1).astype(jnp.int8) >> 4
        return {"codes": pairs.reshape(*codes.shape[:-1], n), "scale": stored["scale"]}
