"""`python -m dynrec_jax.report.picture`: one user's interests over time, from a trained run.

At every event of a history, ABRA's attention over the catalogue is summed by a column of the items (topic, genre):
what the model would recommend at that moment. On the synthetic source the planted interests stand beside it.
"""

import sys
from pathlib import Path

import numpy as np
from absl import flags

from dynrec_jax import workdir as workdirs
from dynrec_jax.batch import History
from dynrec_jax.data.cache import Histories
from dynrec_jax.errors import ConfigError, DataError, report_errors
from dynrec_jax.report.attention import COLUMNS, attention_over, planted_interests, topics_of
from dynrec_jax.report.interests import draw_interests
from dynrec_jax.workdir import Run


def main(arguments: list[str]) -> int:
    """Parses flags and draws; returns the exit status."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "run folder", flag_values=values)
    flags.DEFINE_string("out", None, "PNG to write", flag_values=values)
    flags.DEFINE_string(
        "user",
        None,
        "whose interests; default: the longest history that the model reads whole",
        flag_values=values,
    )
    flags.DEFINE_string(
        "column",
        None,
        f"column of the items to sum by; default: the first of {', '.join(COLUMNS)}",
        flag_values=values,
    )
    return report_errors(lambda: _run(values, arguments))


def _run(values: flags.FlagValues, arguments: list[str]) -> None:
    try:
        values(["picture", *arguments])
    except flags.Error as error:
        raise ConfigError(str(error)) from None
    if not values.workdir or not values.out:
        raise ConfigError("--workdir and --out are needed: a run folder, and the PNG to write")
    draw(workdirs.open(values.workdir), Path(values.out), values.user, values.column)
    print(values.out)


def draw(run: Run, out: Path, user: str | None = None, column: str | None = None) -> None:
    """Draws one user's interests.

    Raises:
      DataError: the dataset has no times, no column to sum by, or no such user.
    """
    if not run.dataset.has_times:
        raise DataError(f"{run.dataset.path}: has no times; there is no time axis to draw interests over")
    names, topic_N = topics_of(run, column)
    histories = Histories(run.dataset, run.config.data.cache_dir)
    number = _choose(run, histories, user)
    user = histories.ids_of(np.array([number]))[0]
    length = run.config.data.max_length
    windows = histories.windows(np.array([number]), histories.lengths[[number]], length)
    real_L = windows.items[0] > 0
    times = windows.times[0][real_L].astype(np.int64) + int(run.dataset.first_time or 0)
    asked = histories.asked(np.array([number]), histories.lengths[[number]])
    inferred_LxT = attention_over(run, History(*windows, asked))[real_L] @ np.eye(len(names))[topic_N]
    planted = planted_interests(run, user, times, names)
    title = f"User {user}: {len(times)} events, {run.dataset.items:,} items in {len(names)} topics"
    draw_interests(out, times, planted, inferred_LxT, names, title)


def _choose(run: Run, histories: Histories, user: str | None) -> int:
    if user is None:
        within = np.where(histories.lengths <= run.config.data.max_length, histories.lengths, 0)
        return int(within.argmax())
    ids = histories.ids_of(np.arange(histories.users))
    if user not in ids:
        raise DataError(f"--user={user}: no such user among the {len(ids):,} of {run.dataset.path}")
    return ids.index(user)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
