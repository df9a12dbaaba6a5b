"""Numbers between NumPy and Arrow without a copy.

`Array.to_numpy` and `pa.array` do the same, but look for pandas first: where it is installed, the first call takes
0.3 to 0.6 seconds to import it.
"""

import numpy as np
import pyarrow as pa


def numbers(array: pa.Array) -> np.ndarray:
    """The numbers of an array without nulls, read-only; the array may be a slice."""
    kind = np.dtype(array.type.to_pandas_dtype())
    if len(array) == 0:
        return np.zeros(0, kind)
    return np.frombuffer(array.buffers()[1], kind, len(array), array.offset * kind.itemsize)


def to_arrow(numbers_N: np.ndarray) -> pa.Array:
    """An array of the same numbers, which must not change as long as it lives."""
    kind = pa.from_numpy_dtype(numbers_N.dtype)
    return pa.Array.from_buffers(kind, len(numbers_N), [None, pa.py_buffer(np.ascontiguousarray(numbers_N))])
