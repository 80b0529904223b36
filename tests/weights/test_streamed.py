"""Matrices for decoding on CPU: the compiled kernel against float64, its fallback, and what it must not reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import max_relative, random_sample, tiny_batch, tiny_config, tiny_params

from andesvl_jax.export.functions import ExportShapes, stages
from andesvl_jax.kernels import cpu
from andesvl_jax.model.andesvl import for_decoding, forward
from andesvl_jax.weights import (
    Adapt,
    LoRA,
    Rule,
    Streamed,
    apply,
    dense,
    embed,
    is_leaf,
    represent,
    stream_matrix,
    stream_table,
    unembed,
)
from andesvl_jax.weights.streamed import FEW_ROWS

TOLERANCE = 2e-6  # float32 sums of up to 3072 terms
needs_kernel = pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")
# i and o that fill no vector, one, blocks and parts of the work, and the few rows in all their groupings
SHAPES = [(1, 1, 1), (1, 37, 53), (2, 16, 4), (3, 100, 7), (7, 1024, 515), (16, 3072, 130), (17, 64, 96)]


@pytest.fixture(params=[pytest.param("kernel", marks=needs_kernel), "fallback"])
def compiled(request) -> bool:
    return request.param == "kernel"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_equal_those_in_double_precision(compiled, shape, dtype):
    rows, i, o = shape
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(i, o)), dtype)
    x = jnp.asarray(rng.normal(size=(rows, i)), jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(w.astype(jnp.float32), np.float64)
    assert max_relative(jax.jit(apply)(stream_matrix(w, compiled=compiled), x), exact) <= TOLERANCE
    assert max_relative(jax.jit(unembed)(stream_table(w.T, compiled=compiled), x), exact) <= TOLERANCE


@needs_kernel
def test_a_row_of_few_is_the_row_alone_bit_for_bit():
    rng = np.random.default_rng(1)
    w = stream_matrix(jnp.asarray(rng.normal(size=(200, 301)), jnp.bfloat16), compiled=True)
    x = jnp.asarray(rng.normal(size=(FEW_ROWS, 200)), jnp.float32)
    together = apply(w, x)
    for row in range(FEW_ROWS):
        np.testing.assert_array_equal(apply(w, x[row : row + 1])[0], together[row])


def test_leaves_stand_for_their_matrices(compiled):
    rng = np.random.default_rng(2)
    matrix, table = jnp.asarray(rng.normal(size=(12, 20)), jnp.float32), jnp.asarray(rng.normal(size=(20, 12)), jnp.float32)
    np.testing.assert_array_equal(dense(stream_matrix(matrix, compiled=compiled)), matrix)
    np.testing.assert_array_equal(dense(stream_table(table, compiled=compiled)), table)
    ids = jnp.array([3, 3, 19])
    np.testing.assert_array_equal(embed(stream_table(table, compiled=compiled), ids, "float32"), table[ids])
    half = table.astype("bfloat16")
    found = embed(stream_table(half, compiled=compiled), ids[None], "float32")
    np.testing.assert_array_equal(found, half[ids][None].astype("float32"))
    assert stream_matrix(matrix, "bfloat16").rows.dtype == jnp.bfloat16
    bf16 = apply(stream_matrix(matrix, compiled=compiled), jnp.ones((1, 12), jnp.bfloat16))
    scores = unembed(stream_table(table, compiled=compiled), jnp.ones((1, 12), jnp.bfloat16))
    assert bf16.dtype == jnp.bfloat16 and scores.dtype == jnp.float32


@needs_kernel
def test_the_kernel_works_inside_loops_and_beside_itself():
    """In a while_loop, in a scan over stacked leaves, and with several products that XLA may run at once."""
    arrays = [jnp.asarray(np.random.default_rng(i).normal(size=(64, 64)) / 8, jnp.float32) for i in range(8)]
    w = [stream_matrix(array, compiled=True) for array in arrays]
    x = jnp.ones((2, 64))
    plain = [dense(m) for m in w]
    looped = jax.jit(
        lambda x: jax.lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, jnp.tanh(apply(w[0], c[1]))), (0, x))[1]
    )
    expected = x
    for _ in range(5):
        expected = jnp.tanh(expected @ plain[0])
    assert max_relative(looped(x), expected) <= TOLERANCE
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *w)
    scanned = jax.jit(lambda x: jax.lax.scan(lambda x, m: (jnp.tanh(apply(m, x)), None), x, stacked)[0])
    expected = x
    for m in plain:
        expected = jnp.tanh(expected @ m)
    assert max_relative(scanned(x), expected) <= 8 * TOLERANCE
    wide = jax.jit(lambda x: [apply(m, x) for m in w * 8])
    for _ in range(20):
        for found, m in zip(wide(x), plain * 8, strict=True):
            assert max_relative(found, x @ m) <= TOLERANCE


@needs_kernel
def test_many_rows_widen_one_16_bit_matrix_at_a_time():
    """Values as of the widened weights; and no more room than two matrices in 32 bits, where XLA alone would take all eight."""
    rng = np.random.default_rng(0)
    plain = [jnp.asarray(rng.normal(size=(256, 256)) / 16, jnp.bfloat16) for _ in range(8)]
    streamed = [stream_matrix(w, compiled=True) for w in plain]

    def chain(x, matrices):
        for w in matrices:
            x = jnp.tanh(apply(w, x))
        return x

    x = jnp.asarray(rng.normal(size=(40, 256)), jnp.float32)
    expected = chain(x, [w.astype(jnp.float32) for w in plain])
    assert max_relative(chain(x, streamed), expected) <= 8 * TOLERANCE
    # no multiple of what the kernel takes at a time
    odd = stream_matrix(jnp.asarray(rng.normal(size=(37, 21)), jnp.bfloat16), compiled=True)
    y = jnp.asarray(rng.normal(size=(40, 37)), jnp.float32)
    assert max_relative(apply(odd, y), y @ dense(odd, jnp.float32)) <= TOLERANCE
    compiled = jax.jit(chain).lower(x, streamed).compile().memory_analysis()
    assert compiled.temp_size_in_bytes <= 2 * 4 * 256 * 256 + 4 * x.nbytes


def test_decoding_parameters_hold_every_matrix_of_the_decoder_streamed_and_no_other():
    config = tiny_config(text={"tie_word_embeddings": False})
    params = represent(tiny_params(config), [Rule(r"decoder\.layers\.q", Adapt(2, 4.0))], jax.random.key(0))
    ready = for_decoding(params, config, "bfloat16")[0]
    layer = ready.decoder.layers[1]
    assert isinstance(layer.q, LoRA) and isinstance(layer.q.base, Streamed) and layer.q.a.dtype == jnp.float32
    matrices = [
        ready.decoder.embedding,
        ready.decoder.head,
        layer.q.base,
        layer.k,
        layer.v,
        layer.o,
        layer.gate,
        layer.up,
        layer.down,
    ]
    assert all(isinstance(w, Streamed) and w.rows.dtype == jnp.bfloat16 for w in matrices)
    of_pictures = lambda ready: jax.tree.leaves((ready.vision, ready.projector), is_leaf=is_leaf)  # noqa: E731
    assert not any(isinstance(w, Streamed) for w in of_pictures(ready))
    half, _ = for_decoding(jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params(config)), config)
    assert sum(isinstance(w, Streamed) for w in of_pictures(half)) == 5 * config.vision.num_layers + 2
    assert all(x.dtype == jnp.float32 for x in (layer.attention_norm, layer.q_norm, ready.decoder.norm))


def test_training_and_export_never_meet_the_kernel():
    config = tiny_config()
    params = tiny_params(config)
    batch = tiny_batch(config, [[random_sample(config, np.random.default_rng(0), ((2, 4),), text=4)]], 8, 8, 4)
    loss = lambda params: forward(params, config, batch).sum()  # noqa: E731
    lowered = [jax.jit(jax.grad(loss)).lower(params).as_text()]
    for stage in stages(params, config, ExportShapes(patches=(8,), prompt=(8,), slots=16)):
        lowered.append(jax.jit(stage.call).lower(stage.weights, stage.cache, stage.inputs).as_text())
    assert len(lowered) == 4 and not any("andesvl" in text for text in lowered)
    ready, _ = for_decoding(params, config)
    decoding = jax.jit(lambda p, x: unembed(p.decoder.embedding, x)).lower(ready, jnp.ones((1, 24))).as_text()
    assert ("andesvl_few_rows" in decoding) == cpu.available()  # the search would find it
