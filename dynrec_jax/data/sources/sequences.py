"""`sequences:FILE`: a user a line, `user item item …`, oldest first, without times."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dynrec_jax.data.sources.columns import refuse_columns
from dynrec_jax.data.sources.lines import line_blocks, require_file
from dynrec_jax.data.sources.source import Job, Source, finish, raw_schema

# A place is the line above this bit and the position in the line below it.
LINE_SHIFT = 24
SCHEMA = raw_schema(times=False, events=False, ratings=False)


def read(job: Job) -> Source:
    """Reads a file of sequences; a line with a user alone is a row whose item is missing.

    Raises:
      DataError: No such file, not UTF-8.
      ConfigError: A column was named: there are none.
    """
    refuse_columns(job.columns, "sequences")
    path = require_file(Path(job.path), "a text file with a user a line: user item item …")
    return finish(
        job, f"sequences:{path.name}", SCHEMA, batches(path), lambda place: f"{path}:{place >> LINE_SHIFT}"
    )


def batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The file's events, in its order."""
    for first, lines in line_blocks(path):
        words = pc.ascii_split_whitespace(pc.ascii_trim_whitespace(pa.array(lines, pa.string())))
        flat = pc.list_flatten(words).to_numpy(zero_copy_only=False)
        line = pc.list_parent_indices(words).to_numpy()
        lengths = pc.list_value_length(words).to_numpy()
        starts = np.cumsum(lengths) - lengths
        position = np.arange(len(flat)) - starts[line]
        user = flat[starts[line]]
        # The user's own word is no event, but a line that holds nothing else has an item missing.
        alone = (lengths[line] == 1) & (user != "")
        keep = (position > 0) | alone
        item = np.where(alone, "", flat)
        place = ((line + first) << LINE_SHIFT) + position
        columns = [
            pa.array(user[keep], pa.string()),
            pa.array(item[keep], pa.string()),
            pa.array(place[keep], pa.int64()),
        ]
        yield pa.record_batch(columns, schema=SCHEMA)
