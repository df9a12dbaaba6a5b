"""One reader a KIND of log; `SOURCES` names them all."""

from collections.abc import Callable

from dynrec_jax.data.sources import amazon, atomic, mind, movielens, sequences, synthetic, table
from dynrec_jax.data.sources.source import Job, Source
from dynrec_jax.errors import DataError

SOURCES: dict[str, Callable[[Job], Source]] = {
    "amazon": amazon.read,
    "atomic": atomic.read,
    "mind": mind.read,
    "movielens": movielens.read,
    "sequences": sequences.read,
    "synthetic": synthetic.read,
    "table": table.read,
}


def split_source(source: str) -> tuple[str, str]:
    """KIND and what follows the colon; DataError where the KIND is unknown."""
    kind, colon, path = source.partition(":")
    kinds = ", ".join(sorted(SOURCES))
    if kind not in SOURCES:
        raise DataError(f"--source={source}: unknown kind {kind!r}; expected KIND:PATH with one of {kinds}")
    if (colon or kind != "synthetic") and not path:
        raise DataError(f"--source={source}: no path; expected {kind}:PATH")
    return kind, path
