"""Numbers to Arrow and back, without pandas."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from dynrec_jax.data.arrow import numbers, to_arrow


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.float32])
def test_there_and_back(kind: type):
    x = np.arange(10).astype(kind)[::3]
    array = to_arrow(x)
    assert array.to_pylist() == x.tolist()
    for back, expected in ((numbers(array), x), (numbers(array[1:3]), x[1:3])):
        assert back.dtype == kind
        np.testing.assert_array_equal(back, expected)


@pytest.mark.parametrize("array", [to_arrow(np.zeros(0, np.int32)), pa.nulls(0, pa.int32())])
def test_of_nothing(array: pa.Array):
    assert numbers(array).shape == (0,)
    assert numbers(array).dtype == np.int32


def test_offsets_of_a_slice_count_from_where_its_values_begin():
    lists = pa.array([[1, 2], [3], None, [4]], pa.large_list(pa.int32()))
    assert numbers(lists[1:].offsets).tolist() == [2, 3, 3, 4]
    assert numbers(lists.values).tolist() == [1, 2, 3, 4]


def test_pandas_is_not_imported():
    """It takes half a second, where a command has no other use for it."""
    code = "import sys, numpy as np; from dynrec_jax.data.arrow import *; numbers(to_arrow(np.arange(3))); "
    code += "sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
