"""The contract of a number format. Letters: n weights along the contracted axis, which is last here; g weights of a group."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from andesvl_jax.errors import UserError

Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Scheme:
    """Rounds weights [..., n] to integer codes with one scale per group, and stores the codes densely.

    A format is a subclass in a file of its own. It defines `encode`, `pack` and `unpack`, and
    overrides what else differs: a format with zero points or an index of kept weights adds arrays.

    Attributes:
      group: weights that share a scale; None: all n of an output channel.
    """

    group: int | None = None
    name: ClassVar[str]
    pack_multiple: ClassVar[int] = 1  # n must be a multiple of it

    def encode(self, w: jax.Array) -> Arrays:
        """float32 [..., n] -> {"codes": int8 [..., n], "scale": float32 [..., n / g]}."""
        raise NotImplementedError

    def decode(self, encoded: Mapping[str, jax.Array]) -> jax.Array:
        """The weights float32 [..., n] of what `encode` returns."""
        codes, scale = encoded["codes"], encoded["scale"]
        groups = codes.reshape(*scale.shape, -1).astype(jnp.float32) * scale[..., None].astype(jnp.float32)
        return groups.reshape(codes.shape)

    def pack(self, encoded: Mapping[str, jax.Array]) -> Arrays:
        """What `encode` returns -> the arrays that are stored, each [..., m] with its own m."""
        raise NotImplementedError

    def unpack(self, stored: Mapping[str, jax.Array], n: int) -> Arrays:
        """The inverse of `pack`, exact for every code."""
        raise NotImplementedError

    def straight_through(self, weight: jax.Array, rounded: jax.Array) -> jax.Array:
        """The value of `rounded` with the gradient of the surrogate; here the identity of `weight`."""
        return rounded + (weight - jax.lax.stop_gradient(weight))  # + 0 keeps the value bit-exact

    def fault(self, stored: Mapping[str, np.ndarray]) -> str | None:
        """What is wrong with stored arrays that have the right shapes and dtypes; None if nothing is."""
        if not np.isfinite(np.asarray(stored["scale"], np.float32)).all():
            return "a scale that is not finite"
        return None

    def check(self, n: int) -> None:
        """Raises UserError unless n weights can be cut into whole groups and packed."""
        group = n if self.group is None else self.group
        if group < 1 or n % group or n % self.pack_multiple:
            raise UserError(
                f"scheme {self.name}: an axis of {n} weights cannot be cut into groups of {group} "
                f"and packed by {self.pack_multiple}; choose a group that divides it."
            )

    def bits_per_weight(self, n: int) -> float:
        """Stored bits per weight, scales included, of an axis of n weights."""
        shapes = jax.eval_shape(lambda w: self.pack(self.encode(w)), jax.ShapeDtypeStruct((n,), jnp.arange(0.0).dtype))
        return sum(8 * x.size * x.dtype.itemsize for x in shapes.values()) / n

    def grouped(self, w: jax.Array) -> jax.Array:
        """[..., n] -> [..., n / g, g]."""
        return w.reshape(*w.shape[:-1], -1, w.shape[-1] if self.group is None else self.group)


def round_symmetric(scheme: Scheme, w: jax.Array, limit: int) -> Arrays:
    """Codes round(w / scale) in [-limit, limit], with scale = max |w| / limit over a group."""
    groups = scheme.grouped(w)
    tiny = jnp.finfo(jnp.float32).tiny  # runtimes refuse a zero scale
    scale = jnp.maximum(jnp.abs(groups).max(-1) / limit, tiny)
    codes = jnp.clip(jnp.round(groups / scale[..., None]), -limit, limit)
    return {"codes": codes.astype(jnp.int8).reshape(w.shape), "scale": scale}
