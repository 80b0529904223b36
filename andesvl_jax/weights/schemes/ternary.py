"""Ternary weights: codes in {-1, 0, 1}, five in a byte as digits of a number in base 3 (3^5 = 243 <= 256)."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from andesvl_jax.weights.schemes.scheme import Scheme

DIGITS = 5


@dataclass(frozen=True)
class Ternary(Scheme):
    """Scale = mean |w| of a group (BitNet b1.58, arXiv 2402.17764).

    Stored as codes uint8 [..., ceil(n / 5)], the earliest weight in the lowest digit, and scale
    float32 [..., n / g]. The last byte of an axis is filled up with zeros.
    """

    name = "ternary"

    def encode(self, w):
        groups = self.grouped(w)
        scale = jnp.maximum(jnp.abs(groups).mean(-1), jnp.finfo(jnp.float32).tiny)
        codes = jnp.clip(jnp.round(groups / scale[..., None]), -1, 1)
        return {"codes": codes.astype(jnp.int8).reshape(w.shape), "scale": scale}

    def pack(self, encoded):
        codes = encoded["codes"]
        rest = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % DIGITS)]
        digits = jnp.pad(codes, rest).reshape(*codes.shape[:-1], -1, DIGITS) + 1
        packed = (digits * 3 ** jnp.arange(DIGITS)).sum(-1).astype(jnp.uint8)
        return {"codes": packed, "scale": encoded["scale"]}

    def unpack(self, stored, n):
        codes = stored["codes"]
        digits = codes[..., None].astype(jnp.int32) // 3 ** jnp.arange(DIGITS) % 3 - 1
        flat = digits.astype(jnp.int8).reshape(*codes.shape[:-1], -1)
        return {"codes": flat[..., :n], "scale": stored["scale"]}

    def fault(self, stored):
        largest = int(np.max(stored["codes"], initial=0))
        if largest >= 3**DIGITS:
            return f"a code byte of {largest}, expected at most {3**DIGITS - 1}"
        return super().fault(stored)
