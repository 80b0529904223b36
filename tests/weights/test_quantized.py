"""Integer weights against a separate NumPy account of them: codes, scales, packing, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from andesvl_jax.weights import FakeQuantized, Packed, dense, dot, embed, quantize, unembed


def numpy_quantized(w: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(integer codes [i, o], dequantized values) of a matrix, one column and one group at a time."""
    limit = {8: 127, 4: 7}[bits]
    codes, values = np.zeros(w.shape, np.int64), np.zeros_like(w)
    for column in range(w.shape[1]):
        for start in range(0, w.shape[0], group):
            part = w[start : start + group, column]
            scale = np.float32(np.abs(part).max() / np.float32(limit))
            codes[start : start + group, column] = np.clip(np.rint(part / scale), -limit, limit)
            values[start : start + group, column] = codes[start : start + group, column].astype(np.float32) * scale
    return codes, values


def unpacked(packed: Packed) -> np.ndarray:
    """Integer codes of a packed matrix, read nibble by nibble: the low nibble is the earlier weight."""
    codes = np.asarray(packed.codes)
    if packed.bits == 8:
        return codes.astype(np.int64)
    out = np.zeros((codes.shape[0] * 2, codes.shape[1]), np.int64)
    for row, byte_row in enumerate(codes):
        for column, byte in enumerate(byte_row):
            for half, nibble in enumerate((int(byte) & 15, int(byte) >> 4)):
                out[2 * row + half, column] = nibble - 16 if nibble > 7 else nibble
    return out


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [None, 6, 8, 3])
def test_codes_and_values_equal_the_numpy_account(bits, group):
    w = np.random.default_rng(bits).normal(size=(24, 10)).astype(np.float32)
    packed = quantize(jnp.asarray(w), bits, group)
    codes, values = numpy_quantized(w, bits, group or 24)
    np.testing.assert_array_equal(unpacked(packed), codes)
    # XLA may divide by multiplying with the reciprocal: one rounding of the scale, one of the product
    np.testing.assert_allclose(dense(packed), values, rtol=2.5e-7)
    assert packed.codes.size * packed.codes.dtype.itemsize == w.size * bits // 8
    assert packed.scale.shape == (24 // (group or 24), 10)
    # half a step is the most that rounding may move a weight
    step = np.repeat(np.asarray(packed.scale), group or 24, axis=0)
    assert (np.abs(np.asarray(dense(packed)) - w) <= step * 0.5001).all()


@pytest.mark.parametrize(("bits", "limit"), [(8, 127), (4, 7)])
def test_every_code_survives_packing(bits, limit):
    codes = np.arange(-limit, limit + 1)
    codes = np.concatenate([codes, [limit]])  # an even number, the largest code in it
    for first in (codes, codes[::-1]):  # every code in the low and in the high nibble
        w = jnp.asarray(np.stack([first, -first, np.full_like(first, limit)], 1), jnp.float32)
        packed = quantize(w, bits)
        np.testing.assert_array_equal(packed.scale, np.ones((1, 3), np.float32))
        np.testing.assert_array_equal(dense(packed), w)
        np.testing.assert_array_equal(dense(quantize(dense(packed), bits)), w)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantizing_twice_is_quantizing_once(bits):
    w = jax.random.normal(jax.random.key(0), (3, 16, 12))  # with a layer axis
    once = dense(quantize(w, bits, 8))
    np.testing.assert_allclose(dense(quantize(once, bits, 8)), once, rtol=1e-6)  # the scale is rounded again: one ulp
    np.testing.assert_array_equal(quantize(w, bits, 8).codes[1], quantize(w[1], bits, 8).codes)


def test_tables_are_read_by_row_and_transposed_like_their_dense_values():
    table, ids = jax.random.normal(jax.random.key(1), (20, 16)), jnp.array([[3, 19], [0, 3]])
    for leaf in (quantize(table, 4, 8, axis=-1), quantize(table, 8, axis=-1), FakeQuantized(table, 4, 8, axis=-1)):
        value = dense(leaf)
        np.testing.assert_array_equal(embed(ids, leaf, jnp.float32), value[ids])
        x = jax.random.normal(jax.random.key(2), (2, 3, 16))
        # float32 products of 16 terms in another order
        np.testing.assert_allclose(unembed(x, leaf), x @ value.T, rtol=2e-5, atol=1e-5)


def test_zero_weights_stay_zero():
    packed = quantize(jnp.zeros((8, 4)), 4)
    assert float(packed.scale.min()) > 0
    np.testing.assert_array_equal(dense(packed), np.zeros((8, 4)))


@pytest.mark.parametrize(
    ("shape", "bits", "group", "message"),
    [
        ((7, 4), 4, None, "7 weights"),
        ((12, 4), 8, 5, "groups of 5"),
        ((12, 4), 4, 0, "groups of 0"),
        ((12, 4), 3, None, "bits is 3"),
    ],
)
def test_what_cannot_be_cut_is_refused(shape, bits, group, message):
    with pytest.raises(ValueError, match=message):
        quantize(jnp.ones(shape), bits, group)


@pytest.mark.parametrize("leaf", [quantize(jnp.ones((6, 4)), 8), FakeQuantized(jnp.ones((6, 4)), 8)], ids=["packed", "fake"])
def test_a_table_quantized_across_its_rows_cannot_be_read_by_row(leaf):
    with pytest.raises(ValueError, match="expected -1"):
        embed(jnp.array([1]), leaf, jnp.float32)


def test_dot_computes_in_the_type_of_its_input():
    w = quantize(jax.random.normal(jax.random.key(0), (8, 6)), 8)
    assert dot(jnp.ones((2, 8), jnp.bfloat16), w, jnp.ones(6)).dtype == jnp.bfloat16
    assert dense(w, jnp.bfloat16).dtype == jnp.bfloat16 and dense(w).dtype == jnp.float32
