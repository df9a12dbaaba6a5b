"""Flags of the verbs that can use a compressed model."""

from typing import TYPE_CHECKING

from absl import flags

from dynrec_jax.parallel.processes import Processes

if TYPE_CHECKING:
    from dynrec_jax.evaluate.compressed import Compression

KINDS = ["float32", "bfloat16", "int8"]


def define(values: flags.FlagValues) -> None:
    """The flags `table`, `encoder` and `prune`."""
    flags.DEFINE_enum(
        "table",
        "float32",
        KINDS,
        "what ranks the catalogue: a half or a quarter of the memory; the best are ranked again exactly",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "encoder", "float32", KINDS, "the user encoder's matrices, when lists are made", flag_values=values
    )
    flags.DEFINE_float(
        "prune", 0.0, "share of each of the user encoder's matrices that is set to 0", flag_values=values
    )


def parse(values: flags.FlagValues, processes: Processes) -> "Compression | None":
    """What the flags say; None where nothing is compressed.

    Raises:
      ConfigError: a share that there is not, or a compressed table that several processes would rank.
    """
    from dynrec_jax.evaluate.compressed import Compression, check_processes

    compression = Compression(values.table, values.encoder, values.prune)
    check_processes(compression, processes)
    return compression if compression.any else None
