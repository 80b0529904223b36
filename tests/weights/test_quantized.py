"""Packed weights against a separate NumPy account of them: codes, scales, packing, limits; for every scheme."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from andesvl_jax.errors import UserError
from andesvl_jax.weights import (
    SCHEMES,
    FakeQuantized,
    Int4,
    Int8,
    Scheme,
    Ternary,
    apply,
    dense,
    embed,
    pack,
    unembed,
)

LIMITS = {Int8: 127, Int4: 7, Ternary: 1}
EVERY = [scheme(group) for scheme in SCHEMES.values() for group in (None, 8)]


def numpy_quantized(w: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """(integer codes [i, o], dequantized values) of a matrix, one column and one group at a time."""
    limit, group = LIMITS[type(scheme)], scheme.group or len(w)
    codes, values = np.zeros(w.shape, np.int64), np.zeros_like(w)
    for column in range(w.shape[1]):
        for start in range(0, w.shape[0], group):
            part = w[start : start + group, column]
            size = np.abs(part).mean() if isinstance(scheme, Ternary) else np.abs(part).max()
            scale = np.float32(size / np.float32(limit))
            codes[start : start + group, column] = np.clip(np.rint(part / scale), -limit, limit)
            codes_of_group = codes[start : start + group, column].astype(np.float32)
            values[start : start + group, column] = codes_of_group * scale
    return codes, values


def unpacked(stored: np.ndarray, scheme: Scheme, size: int) -> np.ndarray:
    """Integer codes [size] of one column's stored bytes, digit by digit, earliest weight first."""
    if isinstance(scheme, Int8):
        return stored.astype(np.int64)
    if isinstance(scheme, Int4):
        halves = [half for byte in stored.tolist() for half in (byte & 15, byte >> 4)]
        return np.array([half - 16 if half > 7 else half for half in halves])
    return np.array([byte // 3**k % 3 - 1 for byte in stored.tolist() for k in range(5)])[:size]


@pytest.mark.parametrize("group", [None, 6, 8, 3])
@pytest.mark.parametrize("kind", SCHEMES.values())
def test_codes_and_values_equal_the_numpy_account(kind, group):
    scheme, w = kind(group), np.random.default_rng(0).normal(size=(24, 10)).astype(np.float32)
    packed = pack(jnp.asarray(w), scheme)
    codes, values = numpy_quantized(w, scheme)
    stored = np.asarray(packed.arrays["codes"])
    for column in range(10):
        np.testing.assert_array_equal(unpacked(stored[:, column], scheme, 24), codes[:, column])
    # XLA may divide by multiplying with the reciprocal: one rounding of the scale, one of the product
    np.testing.assert_allclose(dense(packed), values, rtol=2.5e-7)
    assert packed.arrays["scale"].shape == (24 // (group or 24), 10)
    held = sum(x.size * x.dtype.itemsize for x in packed.arrays.values())
    assert 8 * held == scheme.bits_per_weight(24) * 240


@pytest.mark.parametrize("scheme", EVERY, ids=str)
def test_packing_is_exact_for_every_code(scheme):
    """Every code at every offset of a byte, and random ones."""
    limit = LIMITS[type(scheme)]
    codes = np.arange(-limit, limit + 1)
    rng = np.random.default_rng(1)
    size = 40 * len(codes)
    rows = [np.roll(np.resize(codes, size), shift) for shift in range(5)]
    rows += [rng.integers(-limit, limit + 1, size) for _ in range(5)]
    encoded = {"codes": jnp.asarray(np.stack(rows), jnp.int8), "scale": jnp.ones((10, size // 8))}
    back = scheme.unpack(scheme.pack(encoded), size)
    for name, value in encoded.items():
        np.testing.assert_array_equal(back[name], value)


@pytest.mark.parametrize("scheme", [Int8(8), Int4(8)], ids=str)
def test_quantizing_twice_is_quantizing_once(scheme):
    w = jax.random.normal(jax.random.key(0), (3, 16, 12))  # with a layer axis
    once = dense(pack(w, scheme))
    # the scale is rounded again: one ulp
    np.testing.assert_allclose(dense(pack(once, scheme)), once, rtol=1e-6)
    for name, array in pack(w, scheme).arrays.items():
        np.testing.assert_array_equal(array[1], pack(w[1], scheme).arrays[name])


@pytest.mark.parametrize("scheme", EVERY, ids=str)
def test_tables_are_read_by_row_and_transposed_like_their_dense_values(scheme):
    table, ids = jax.random.normal(jax.random.key(1), (20, 16)), jnp.array([[3, 19], [0, 3]])
    for leaf in (pack(table, scheme, axis=-1), FakeQuantized(table, scheme, axis=-1)):
        value = dense(leaf)
        np.testing.assert_array_equal(embed(leaf, ids, jnp.float32), value[ids])
        x = jax.random.normal(jax.random.key(2), (2, 3, 16))
        # float32 products of 16 terms in another order
        np.testing.assert_allclose(unembed(leaf, x), x @ value.T, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", EVERY, ids=str)
def test_zero_weights_stay_zero(scheme):
    packed = pack(jnp.zeros((8, 4)), scheme)
    assert float(packed.arrays["scale"].min()) > 0
    np.testing.assert_array_equal(dense(packed), np.zeros((8, 4)))


@pytest.mark.parametrize(
    ("shape", "scheme", "message"),
    [
        ((7, 4), Int4(), "7 weights"),
        ((12, 4), Int8(5), "groups of 5"),
        ((12, 4), Int4(0), "groups of 0"),
        ((12, 4), Ternary(7), "groups of 7"),
    ],
)
def test_what_cannot_be_cut_is_refused(shape, scheme, message):
    with pytest.raises(UserError, match=message):
        pack(jnp.ones(shape), scheme)


def test_a_table_quantized_across_its_rows_cannot_be_read_by_row():
    for leaf in (pack(jnp.ones((6, 4)), Int8()), FakeQuantized(jnp.ones((6, 4)), Int8())):
        with pytest.raises(ValueError, match="expected -1"):
            embed(leaf, jnp.array([1]), jnp.float32)


def test_apply_computes_in_the_type_of_its_input():
    w = pack(jax.random.normal(jax.random.key(0), (8, 6)), Int8())
    assert apply(w, jnp.ones((2, 8), jnp.bfloat16), jnp.ones(6)).dtype == jnp.bfloat16
    assert dense(w, jnp.bfloat16).dtype == jnp.bfloat16 and dense(w).dtype == jnp.float32


def test_stored_arrays_that_no_encoder_writes_are_named():
    packed = pack(jax.random.normal(jax.random.key(0), (10, 3)), Ternary())
    arrays = {name: np.array(x) for name, x in packed.arrays.items()}
    assert packed.scheme.fault(arrays) is None
    assert "243" not in (packed.scheme.fault(arrays) or "")
    arrays["codes"][0, 0] = 250
    assert "a code byte of 250, expected at most 242" in packed.scheme.fault(arrays)
    arrays["codes"][0, 0], arrays["scale"][0, 0] = 0, np.nan
    assert "not finite" in packed.scheme.fault(arrays)
