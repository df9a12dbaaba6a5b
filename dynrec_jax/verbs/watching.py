"""The flag of verbs that several processes may run together: how long one may show no sign of life."""

from absl import flags

SECONDS = 300.0


def define_watchdog(values: flags.FlagValues) -> None:
    """Defines `--watchdog`."""
    flags.DEFINE_float(
        "watchdog",
        SECONDS,
        "seconds without a sign of life after which a run is taken to be stuck and ended; start, texts, checkpoints "
        "and what evaluate and score do may take ten times as long, a compiler an hour; 0: never",
        lower_bound=0.0,
        flag_values=values,
    )
