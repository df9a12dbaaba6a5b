"""All kinds of towers; a new kind is a module of this package and a name in `KINDS`."""

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
    text.check_text(job)
    for kind in KINDS:
        if kind is not text:
            list(kind.read(job))


def columns_of(config: ml_collections.ConfigDict) -> set[str]:
    """The item columns that a config's towers read."""
    item = config.item
    return {*item.text, *item.vectors, *(name.partition(":")[0] for name in item.attributes)}
