"""Records what one seed of an experiment reached, in experiments/results/NAME/seedK.json; README's table is made of it.

    dynrec train --config=experiments/beauty.py --config.seed=0 --workdir=runs/beauty/seed0
    dynrec evaluate --workdir=runs/beauty/seed0 --split=validation
    dynrec evaluate --workdir=runs/beauty/seed0
    python experiments/results/record.py --config=experiments/beauty.py --config.seed=0 --workdir=runs/beauty/seed0

Where the data does not lie where the experiment file says, name it as a reader would, `--config.dataset=data/shop`, and
it stands in the command; an absolute path does not. The folder must be of a run of that experiment file and of nothing
else: what the file says now and what the run was trained with are compared, and a difference ends the program with
status 2. Start it from the commit that trained. With `--with=runs/beauty/seed1,runs/beauty/seed2`, which `dynrec
evaluate` had too, it keeps what these seeds reach together. Only metrics over all users are kept.
"""

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dynrec_jax import config as configs
from dynrec_jax.errors import ConfigError, UserError
from dynrec_jax.files import write_whole
from dynrec_jax.verbs.evaluate import paths_of
from dynrec_jax.verbs.experiment import define_config, read_config

RESULTS = Path(__file__).resolve().parent
NOT_METRICS = (
    "split",
    "users",
    "catalogue",
    "step",
    "protocol",
    "baselines",
    "dataset",
    "oracle",
    "drift",
    "cold",
    "together",
)
TOGETHER = "_together"
MOVABLE = ("dataset", "data.cache_dir", "compiled_dir", "item.bert")  # where things lie on a machine


def main(arguments: list[str]) -> int:
    """Writes the file and prints its name."""
    values = flags.FlagValues()
    define_config(values)
    flags.DEFINE_string(
        "workdir", None, "run folder, trained and evaluated on both splits", flag_values=values
    )
    flags.DEFINE_string(
        "name", None, "of the experiment; default: the file's, with its argument", flag_values=values
    )
    flags.DEFINE_string("with", None, "run folders of other seeds, as of `evaluate`", flag_values=values)
    try:
        values(["record.py", *arguments])
        config = read_config(values)
        if not values.workdir:
            raise ConfigError("--workdir is missing; expected the folder of the experiment's run")
        file, _, argument = values["config"].value.partition(":")
        others = paths_of(values["with"].value)
        named = values.name or "_".join(filter(None, [Path(file).stem, argument]))
        named += TOGETHER if others else ""
        result = recorded(Path(values.workdir), config, arguments, named, others)
    except (flags.Error, UserError) as error:
        sys.stderr.write(f"record: {error}\n")
        return 2
    path = RESULTS / named / f"seed{config.seed}.json"
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(result, indent=2) + "\n")
    print(path)
    return 0


def recorded(
    workdir: Path, config: Any, arguments: list[str], named: str, others: Sequence[Path] = ()
) -> dict[str, Any]:
    """What is kept of a run of the experiment `named`, or of this run and `others`, its other seeds, together.

    Raises:
      ConfigError: the run is of another config, or was not evaluated on both splits with its best checkpoint.
    """
    stated = _movable_left_out(configs.flat(config))
    seeds = [_seed_of(path, stated, path != workdir) for path in (workdir, *others)]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--with: the seeds are {', '.join(map(str, seeds))}; expected each once")
    measured = {split: _measured(workdir, split, others) for split in ("validation", "test")}
    steps = [
        ([run["step"] for run in each.get("together", [each])], each["dataset"]) for each in measured.values()
    ]
    if steps[0] != steps[1]:
        raise ConfigError(f"{workdir}: the two splits were measured at different steps; evaluate both anew")
    test = measured["test"]
    return {
        "command": _command(arguments, named, seeds),
        "config": stated,
        "commit": _commit(),
        "date": datetime.datetime.fromtimestamp(_file(workdir, "test", others).stat().st_mtime, datetime.UTC)
        .date()
        .isoformat(),
        "machine": _machine(),
        "content": test["dataset"],
        "protocol": {**test["protocol"], "users": test["users"], "catalogue": test["catalogue"]},
        "step": test["step"],
        **({"together": seeds} if others else {}),
        "validation": _metrics(measured["validation"]),
        "test": _metrics(test),
        "baselines": {name: _metrics(each) for name, each in {**test["baselines"], **_oracle(test)}.items()},
    }


def _movable_left_out(flat: dict[str, Any]) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in flat.items()
        if key not in MOVABLE
    }


def _oracle(test: dict[str, Any]) -> dict[str, Any]:
    """The best possible, where the data was generated and it is known."""
    return {"oracle": test["oracle"]} if "oracle" in test else {}


def _seed_of(workdir: Path, stated: dict[str, Any], another: bool) -> int:
    """The seed of a run that must be of the stated config, or of it with another seed."""
    trained = _movable_left_out(configs.flat(configs.from_json(workdir / "config.json")))
    ids_alone = stated["item.fusion"] == trained.get("item.fusion") == "id"
    keys = [
        key
        for key in stated
        # Seeds may differ, and so may what would describe an item besides its id.
        if not (another and key == "seed") and not (ids_alone and key.startswith("item."))
    ]
    if differing := sorted(key for key in keys if stated[key] != trained.get(key)):
        told = ", ".join(f"{key}: {trained.get(key)!r}, not {stated[key]!r}" for key in differing)
        raise ConfigError(
            f"{workdir}: was not trained by this experiment file ({told}); train it, or name another"
        )
    return int(trained["seed"])


def _file(workdir: Path, split: str, others: Sequence[Path]) -> Path:
    return workdir / "evaluation" / f"{split}{TOGETHER if others else ''}.json"


def _measured(workdir: Path, split: str, others: Sequence[Path]) -> dict[str, Any]:
    path = _file(workdir, split, others)
    flag = f" --with={','.join(map(str, others))}" if others else ""
    again = f"run `dynrec evaluate --workdir={workdir} --split={split}{flag}` first"
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; {again}") from None
    runs = [each["workdir"] for each in found.get("together", [])]
    if others and runs != [str(each) for each in (workdir, *others)]:
        raise ConfigError(f"{path}: is of {', '.join(runs)} together; {again}")
    return found


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in result.items() if name not in NOT_METRICS}


def _command(arguments: list[str], named: str, seeds: list[int]) -> str:
    """One line that trains and measures the same again; where things lie on this machine is left out."""

    def kept(flag: str) -> bool:
        name, _, value = flag.partition("=")
        return (
            name.startswith("--config")
            and name != "--config.seed"
            and (name[9:] not in MOVABLE or not Path(value).is_absolute())
        )

    # The folders of several seeds are those that each has for itself.
    folders = [f"runs/{named.removesuffix(TOGETHER)}/seed{seed}" for seed in seeds]
    trained = [
        shlex.join(
            ["dynrec", "train", *filter(kept, arguments), f"--config.seed={seed}", f"--workdir={folder}"]
        )
        for seed, folder in zip(seeds, folders, strict=True)
    ]
    measured = ["dynrec", "evaluate", f"--workdir={folders[0]}"]
    measured += [f"--with={','.join(folders[1:])}"] if folders[1:] else []
    return " && ".join([*trained, shlex.join(measured)])


def _commit() -> str:
    """The code's commit, with `+` where files differ from it."""
    here = {"cwd": RESULTS, "capture_output": True, "text": True, "check": True}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], **here).stdout.strip()  # type: ignore[call-overload]
    changed = subprocess.run(  # type: ignore[call-overload]
        ["git", "status", "--porcelain", "--untracked-files=no", "--", "../../dynrec_jax", ".."], **here
    ).stdout.strip()
    return commit + ("+" if changed else "")


def _machine() -> str:
    model = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{len(os.sched_getaffinity(0))} cores, {model}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
