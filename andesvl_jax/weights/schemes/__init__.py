"""Number formats of stored weights, one file each. `SCHEMES` maps the name on disk to the class."""

from andesvl_jax.weights.schemes.int4 import Int4
from andesvl_jax.weights.schemes.int8 import Int8
from andesvl_jax.weights.schemes.scheme import Scheme
from andesvl_jax.weights.schemes.ternary import Ternary

SCHEMES: dict[str, type[Scheme]] = {scheme.name: scheme for scheme in (Int8, Int4, Ternary)}

__all__ = ["SCHEMES", "Int4", "Int8", "Scheme", "Ternary"]
