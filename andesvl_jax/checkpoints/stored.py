"""A tensor where it lies in a file: its place, type and shape, and a view of it that reads nothing ahead."""

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from andesvl_jax.errors import UserError

# types of weights, by their safetensors names; what a file holds beside these is listed by name and refused by the loader
FLOATS = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
INTEGERS = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "U8": np.dtype(np.uint8)}  # codes of packed weights
OTHER_BYTES = {
    "U64": 8,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}


def item_bytes(dtype: str) -> int | None:
    """Bytes of one element; None for a type this project does not know."""
    known = FLOATS | INTEGERS
    return known[dtype].itemsize if dtype in known else OTHER_BYTES.get(dtype)


@dataclass(frozen=True)
class Stored:
    """`offset` and `span` in bytes of `file`, checked against its size; `strides` in elements, None when contiguous."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    span: int
    strides: tuple[int, ...] | None = None

    def view(self) -> np.ndarray:
        """The tensor, read-only, mapped from the file: a page is read when it is touched, all are released with the array.

        Raises:
          UserError: the file went away or shrank since it was checked.
        """
        dtype = (FLOATS | INTEGERS)[self.dtype]
        try:
            flat = np.memmap(self.file, dtype, "r", self.offset, (self.span // dtype.itemsize,))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.file}: cannot be mapped ({error}), expected a file that nobody is writing to.") from error
        if self.strides is None:
            return flat.reshape(self.shape)
        return np.lib.stride_tricks.as_strided(flat, self.shape, [s * dtype.itemsize for s in self.strides], writeable=False)


def transfer(out: np.ndarray, x: np.ndarray) -> None:
    """out[...] = x with a cast to out's type, a few rows at a time, so that no second copy of a tensor is ever whole.

    Blocks of 16 rows keep a transposing copy in cache: 0.8 ns per element on one core where NumPy alone takes 5 to 12.
    """
    bits = np.dtype(f"u{out.itemsize}") if out.dtype.kind == "V" else out.dtype  # NumPy copies types it does not know slowly
    rows = 16 if out.ndim > 1 and abs(out.strides[0]) < abs(out.strides[-1]) else 4096
    for i in range(0, len(x), rows):
        out[i : i + rows].view(bits)[...] = x[i : i + rows].astype(out.dtype, copy=False).view(bits)
