"""The position table resized to a grid, against loops that follow torch's `interpolate` tap by tap; and windows against loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import max_relative, random_sample, tiny_batch, tiny_config, tiny_params

from andesvl_jax.model.position_table import position_embedding
from andesvl_jax.model.vision import encode


def raster(rows: int, columns: int):
    coordinates = np.stack(np.indices((rows, columns)), -1).reshape(-1, 2)
    return coordinates, np.broadcast_to([rows, columns], coordinates.shape)


def cubic_taps(index: int, size: int, n: int):
    """torch's upsample_bicubic2d, align_corners=False, a = -0.75: four (clamped source, weight) pairs of one output index."""
    a, source = -0.75, (index + 0.5) * n / size - 0.5
    t = source - math.floor(source)
    inner = lambda x: ((a + 2) * x - (a + 3)) * x * x + 1  # noqa: E731
    outer = lambda x: ((a * x - 5 * a) * x + 8 * a) * x - 4 * a  # noqa: E731
    weights = [outer(t + 1), inner(t), inner(1 - t), outer(2 - t)]
    return [(min(max(math.floor(source) + k, 0), n - 1), w) for k, w in zip((-1, 0, 1, 2), weights, strict=True)]


def bicubic(table, n: int, rows: int, columns: int):
    square, out = table.reshape(n, n, -1), np.zeros((rows, columns, table.shape[-1]))
    for r in range(rows):
        for c in range(columns):
            out[r, c] = sum(wr * wc * square[sr, sc] for sr, wr in cubic_taps(r, rows, n) for sc, wc in cubic_taps(c, columns, n))
    return out.reshape(rows * columns, -1)


def linear(table, rows: int, columns: int):
    """torch's upsample_linear1d, align_corners=False, of the flattened table to rows * columns entries."""
    size, out = rows * columns, np.zeros((rows * columns, table.shape[-1]))
    for i in range(size):
        source = max((i + 0.5) * len(table) / size - 0.5, 0.0)
        low = int(source)
        high = low + (low < len(table) - 1)
        out[i] = (1 - (source - low)) * table[low] + (source - low) * table[high]
    return out


@pytest.mark.parametrize("grid", [(2, 2), (4, 10), (6, 4), (5, 5), (22, 2), (16, 12)])
@pytest.mark.parametrize("method", ["two_dim", "one_dim"])
def test_interpolation_equals_torchs_taps(method, grid):
    n, table = 5, np.random.default_rng(0).normal(size=(25, 7)).astype(np.float32)
    expected = bicubic(table, n, *grid) if method == "two_dim" else linear(table, *grid)
    found = position_embedding(jnp.asarray(table), n, method, *map(jnp.asarray, raster(*grid)))
    # float32 source coordinates: at 22 output rows of a 5-row table their rounding moves a weight by 1e-6
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("method", ["two_dim", "one_dim"])
def test_a_grid_as_large_as_the_table_reads_the_table(method):
    table = jax.random.normal(jax.random.key(0), (64, 6))
    np.testing.assert_array_equal(position_embedding(table, 8, method, *map(jnp.asarray, raster(8, 8))), table)


def numpy_layer(p, config, x, coordinates, groups):
    """One AIMv2 block in float64, attention as a loop over patches that looks only at patches of the same group."""
    vision = config.vision
    heads, h = vision.num_heads, vision.head_dim
    norm = lambda v, w: v / np.sqrt((v * v).mean(-1, keepdims=True) + vision.norm_eps) * w  # noqa: E731
    q, k, v = (part.reshape(-1, heads, h) for part in np.split(norm(x, p.norm1[0]) @ p.qkv[0], 3, axis=1))
    frequency = vision.rope_theta ** (-np.arange(h // 4) * 2 / (h // 2))
    angle = np.concatenate([coordinates[:, :1] * frequency, coordinates[:, 1:] * frequency], 1)[:, None]

    def turned(a):
        first, second, cos, sin = a[..., : h // 2], a[..., h // 2 :], np.cos(angle), np.sin(angle)
        return np.concatenate([first * cos - second * sin, first * sin + second * cos], -1)

    q, k, out = turned(q), turned(k), np.zeros_like(v)
    for i in range(len(x)):
        same = [j for j in range(len(x)) if groups[j] == groups[i]]
        for head in range(heads):
            weight = np.exp([q[i, head] @ k[j, head] / math.sqrt(h) for j in same])
            out[i, head] = sum(w * v[j, head] for w, j in zip(weight / weight.sum(), same, strict=True))
    x = x + out.reshape(len(x), -1) @ p.proj[0]
    y = norm(x, p.norm2[0])
    gate = y @ p.fc1[0]
    return x + (gate / (1 + np.exp(-gate)) * (y @ p.fc3[0])) @ p.fc2[0]


@pytest.mark.parametrize("full_layers", [(), (0,)])
@pytest.mark.parametrize("backend", ["einsum", "chunked"])
def test_windows_equal_a_loop_over_the_patches_of_each_window(full_layers, backend):
    config = tiny_config(
        vision={"num_layers": 1, "full_attention_layers": full_layers, "window_size": 8}, attention=backend, attention_chunk=9
    )
    params, sample = tiny_params(config), random_sample(config, np.random.default_rng(1), ((6, 10), (4, 4), (2, 6)))
    images = tiny_batch(config, [[sample]], tokens=40, patches=96).images
    side = 4  # 8 pixels are two visual tokens, four patches; 6 x 10 patches make 2 x 3 windows, the last ones smaller
    x = np.random.default_rng(2).normal(size=(1, 96, config.vision.hidden_size)).astype(np.float32)
    found = jax.jit(encode, static_argnums=1)(params.vision, config, x, images.coordinates, images.segments)

    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params.vision.layers)
    coordinates, count = images.coordinates[0, : sample.patches], sample.patches
    window = [(s, *(c // side if not full_layers else (0, 0))) for s, c in zip(images.segments[0], coordinates, strict=False)]
    expected = numpy_layer(p, config, x[0, :count].astype(np.float64), coordinates, window)
    expected = expected / np.sqrt((expected**2).mean(-1, keepdims=True) + config.vision.norm_eps) * np.asarray(params.vision.norm)
    # float32 against float64 through one layer; a patch in the wrong window changes the result by 1e-2
    assert max_relative(found[0, :count], expected) <= 2e-5
