"""The learned position table, read at each patch's place in its own image's grid.

P patches, n side of the square table, C vision width. Source: spec of torch `interpolate(mode="bicubic", align_corners=False)`.
"""

import jax
import jax.numpy as jnp

CUBIC_A = -0.75  # torch's cubic coefficient (Pillow and jax.image use -0.5)


def position_embedding(table: jax.Array, n: int, interpolation: str, coordinates, grids) -> jax.Array:
    """The table resized to each patch's grid, at that patch.

    Args:
      table: [n * n, C]; coordinates: int32 [..., 2] (row, col); grids: int32 [..., 2] (rows, cols) of the patch's image.
      interpolation: "two_dim" (released): separable bicubic; "one_dim": linear over the flattened table.
    Returns:
      [..., C] in the table's dtype.
    """
    if interpolation == "one_dim":
        index = coordinates[..., 0] * grids[..., 1] + coordinates[..., 1]
        return _linear(index, grids[..., 0] * grids[..., 1], n * n).astype(table.dtype) @ table
    rows = _cubic(coordinates[..., 0], grids[..., 0], n)
    cols = _cubic(coordinates[..., 1], grids[..., 1], n)
    weights = (rows[..., :, None] * cols[..., None, :]).reshape(*rows.shape[:-1], n * n)
    return weights.astype(table.dtype) @ table  # one matmul: taps as gathers would scatter in the backward pass


def _source(index, size, n: int) -> jax.Array:
    return (index.astype(jnp.float32) + 0.5) * n / jnp.maximum(size, 1).astype(jnp.float32) - 0.5


def _cubic(index, size, n: int) -> jax.Array:
    """float32 [..., n]: weight of each table row for output `index` of `size`; taps beyond the edge count for the edge."""
    source = _source(index, size, n)
    floor = jnp.floor(source)
    taps = floor[..., None] + jnp.arange(-1, 3, dtype=jnp.float32)
    d = jnp.abs(source[..., None] - taps)
    a = CUBIC_A
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    weight = jnp.where(d <= 1, near, far)
    clamped = jnp.clip(taps, 0, n - 1).astype(jnp.int32)
    return jnp.sum(weight[..., None] * (clamped[..., None] == jnp.arange(n)), axis=-2)


def _linear(index, size, n: int) -> jax.Array:
    source = jnp.maximum(_source(index, size, n), 0.0)
    low = jnp.floor(source)
    high = jnp.minimum(low + 1, n - 1)
    fraction = (source - low)[..., None]
    entries = jnp.arange(n)
    return (1 - fraction) * (low[..., None] == entries) + fraction * (high[..., None] == entries)
