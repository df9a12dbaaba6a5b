"""`synthetic:users=…,items=…,seed=…`: a log with planted interests, generated, then read like any other."""

from __future__ import annotations

from dynrec_jax.data.sources.columns import refuse_columns
from dynrec_jax.data.sources.items import read_items
from dynrec_jax.data.sources.source import Job, Source
from dynrec_jax.data.sources.table import DEFAULTS, read_files


def read(job: Job) -> Source:
    """Generates the log in the job's folder and reads it.

    Raises:
      DataError: An unknown key or a value that is none.
      ConfigError: A column was named: they are known.
    """
    from dynrec_jax.data import synthetic

    refuse_columns(job.columns, "synthetic")
    spec = synthetic.parse(job.path)
    folder = job.folder / "synthetic"
    folder.mkdir()
    synthetic.write_log(spec, folder)
    items, _ = read_items(job.con, folder / "items.csv", None)
    name = f"synthetic:{job.path}" if job.path else "synthetic"
    return read_files(job, [folder / "events.csv"], name, DEFAULTS, items)
