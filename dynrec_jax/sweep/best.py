"""The best trial's config as an experiment file, for `dynrec train` to take."""

import ml_collections

from dynrec_jax import config as configs
from dynrec_jax.sweep.definition import Sweep
from dynrec_jax.sweep.ledger import Row
from dynrec_jax.sweep.table import SEED, best, groups


def experiment_file(sweep: Sweep, rows: list[Row]) -> str | None:
    """The text of an experiment file whose run is the best trial's; None while no trial is complete."""
    row = best(rows)
    if row is None or row.value is None:
        return None
    told = (
        f"trial {row.number} of {sweep.total}: validation {sweep.metric} {row.value:.4f} at step {row.step}"
    )
    if SEED in sweep.keys:
        group = groups(rows)[0]
        told += f"; over {len(group.rows)} seeds {group.mean:.4f} ± {group.deviation:.4f}"
    config = sweep.config_of(row.point)
    config.logging.group = ""  # it stands alone
    lines = [f"    c.{key} = {value!r}" for key, value in _changed(config).items()]
    return "\n".join(
        [
            f'"""The best config of a sweep, {told}."""',
            "",
            "from dynrec_jax.config import default_config",
            "",
            "",
            "def get_config():",
            "    c = default_config()",
            *lines,
            "    return c",
            "",
        ]
    )


def _changed(config: ml_collections.ConfigDict) -> dict[str, object]:
    """The keys in which a config differs from the default one."""
    default = configs.flat(configs.default_config())
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in configs.flat(config).items()
        if value != default[key]
    }
