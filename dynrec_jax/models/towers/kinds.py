"""All kinds of towers; a new kind is a module of this package, a name in `KINDS`, and its keys in the config."""

import ml_collections

from dynrec_jax.models.towers import attributes, text, triples, vectors
from dynrec_jax.models.towers.tower import Job, Kind, Tower

KINDS: tuple[Kind, ...] = (text, attributes, vectors, triples)


def read_towers(job: Job) -> list[Tower]:
    """All towers that a config asks for; none where items are their ids alone.

    Raises:
      ConfigError: the dataset lacks what one is made of.
      DataError: a file is not what it must be.
    """
    if job.config.item.fusion == "id":
        return []
    return [tower for kind in KINDS for tower in kind.read(job)]


def check_towers(job: Job) -> None:
    """Raises ConfigError or DataError where a config's towers cannot be read, before work starts."""
    for kind in KINDS:
        kind.check(job)


def columns_of(config: ml_collections.ConfigDict) -> set[str]:
    """The item columns that a config's towers read."""
    return set().union(*(kind.columns(config) for kind in KINDS))
