"""8-bit integers, symmetric and narrow: codes in [-127, 127], one byte each."""

from dataclasses import dataclass

from andesvl_jax.weights.schemes.scheme import Scheme, round_symmetric


@dataclass(frozen=True)
class Int8(Scheme):
    """Stored as codes int8 [..., n] and scale float32 [..., n / g]."""

    name = "int8"

    def encode(self, w):
        return round_symmetric(self, w, 127)

    def pack(self, encoded):
        return dict(encoded)

    def unpack(self, stored, n):
        return dict(stored)
