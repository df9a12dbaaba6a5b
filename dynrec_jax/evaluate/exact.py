"""Rows of an item table on the disk, for those who need a few of them exactly and have no memory for all."""

import tempfile
from pathlib import Path

import jax
import numpy as np

from dynrec_jax.errors import MachineError
from dynrec_jax.parallel.table import rows_of


class ExactRows:
    """A table `float32[R, D]`, mapped from a file that has no name: it goes with the process, however that ends."""

    def __init__(self, table_RxD: jax.Array, folder: Path):
        """Writes what the devices of this process hold, which must be all of it, into a file in `folder`.

        Raises:
          MachineError: it cannot be written.
        """
        size, width = table_RxD.shape
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                for shard in table_RxD.addressable_shards:
                    file.seek((shard.index[0].start or 0) * width * table_RxD.dtype.itemsize)
                    file.write(np.asarray(shard.data).data)
                file.flush()
                self._rows_RxD = np.memmap(file, table_RxD.dtype, mode="r", shape=(size, width))
        except OSError as error:
            raise MachineError(
                f"{folder}: {table_RxD.nbytes:,} bytes of item vectors cannot be written there ({error}); "
                "choose another --cache_dir"
            ) from None

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """float32[..., D], the rows of items int32[...]; zeros of item 0."""
        return np.asarray(self._rows_RxD[rows_of(ids, len(self._rows_RxD))])
