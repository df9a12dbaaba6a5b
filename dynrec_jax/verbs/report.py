"""One page about a run: metrics, curves, the drift protocol, and a few users' interests over time.

Measures what `dynrec evaluate --drift` would, where that is not there yet. The page is one file, needs no network, and
holds titles and histories of the users that it shows: keep it where the data may lie.
"""

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from dynrec_jax.errors import ConfigError, MachineError
from dynrec_jax.verbs import drift, evaluate
from dynrec_jax.verbs.caches import CACHE_DIR

if TYPE_CHECKING:
    from dynrec_jax.workdir import Run

USERS = 3  # that are shown where none are named


def define_flags() -> flags.FlagValues:
    """The verb's flags."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "run folder", flag_values=values)
    flags.DEFINE_string("out", None, "HTML file to write [WORKDIR/report.html]", flag_values=values)
    flags.DEFINE_enum("split", "test", ["validation", "test"], "which targets", flag_values=values)
    flags.DEFINE_list("users", None, "ids of users to show [three with long histories]", flag_values=values)
    flags.DEFINE_string("column", None, "column of the items that names their topics", flag_values=values)
    flags.DEFINE_string("step", "best", "checkpoint: best, last or a step", flag_values=values)
    flags.DEFINE_string("dataset", None, "where the dataset folder lies now, if it moved", flag_values=values)
    flags.DEFINE_string("cache_dir", None, CACHE_DIR, flag_values=values)
    return values


def run(values: flags.FlagValues) -> None:
    """Writes the page; prints where it is."""
    if not values.workdir:
        raise ConfigError("--workdir is missing; expected a run folder made by `dynrec train`")
    step = evaluate.parse_step(values.step)
    workdir = Path(values.workdir)
    out = Path(values.out) if values.out else workdir / "report.html"
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"--out={out}: no file can be written there; give a file in a folder that is there")
    text = make(workdir, values.split, step, values.users, values.column, values.dataset, values.cache_dir)
    from dynrec_jax.files import write_whole

    try:
        write_whole(out, text)
    except OSError as error:
        raise MachineError(f"{out}: cannot be written ({error})") from None
    print(f"written to {out}")


def make(
    workdir: Path,
    which: str = "test",
    step: str | int = "best",
    users: list[str] | None = None,
    column: str | None = None,
    dataset: str | None = None,
    cache_dir: str | None = None,
) -> str:
    """The page's HTML."""
    from dynrec_jax import workdir as workdirs
    from dynrec_jax.report.page import page
    from dynrec_jax.report.stories import stories

    opened = workdirs.open(workdir, step, dataset)
    evaluation, parts = _measured(workdir, which, opened, dataset, cache_dir)
    return page(
        f"{workdir.absolute().name}: {which}",
        _facts(opened, evaluation),
        evaluation,
        parts,
        _log(workdir),
        stories(opened, users, USERS, column, cache_dir or opened.config.data.cache_dir),
    )


def _log(workdir: Path) -> list[dict[str, float]]:
    """Lines of the run's metrics; one that was cut short when the run was killed is left out."""
    found = []
    try:
        lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _measured(
    workdir: Path, which: str, opened: "Run", dataset: str | None, cache_dir: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `evaluate --drift` wrote of this checkpoint, or what it would."""
    folder = workdir / "evaluation"
    found = []
    for name in (f"{which}.json", f"drift_{which}.json"):
        try:
            found.append(json.loads((folder / name).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            break
    if len(found) == 2 and all(each.get("step") == opened.step for each in found):
        return found[0], found[1]
    result = evaluate.measure(workdir, which, opened.step, dataset, cache_dir, parts=True)
    parts = result.pop("drift")
    evaluate.write(workdir, result)
    drift.write(workdir, parts)
    return result, parts


def _facts(opened: "Run", evaluation: dict[str, Any]) -> dict[str, str]:
    config, data = opened.config, opened.dataset
    return {
        "dataset": data.source,
        "users": f"{data.users:,}",
        "items": f"{data.items:,}",
        "events": f"{data.events:,}",
        "split": config.evaluation.split,
        "asked": f"{evaluation['users']:,}",
        "model": f"{config.model.block}, {config.model.layers} layers of {config.model.dim}",
        "step": f"{opened.step:,} of {config.train.steps:,}",
    }
