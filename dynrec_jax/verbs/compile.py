"""Compiles a run's programs for a TPU topology or a number of GPUs that need not be there: will it fit, how fast."""

import json
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from dynrec_jax.errors import ConfigError, MachineError
from dynrec_jax.verbs.experiment import define_config, read_config


def define_flags() -> flags.FlagValues:
    """The verb's flags."""
    values = flags.FlagValues()
    define_config(values)
    flags.DEFINE_string(
        "topology",
        None,
        "devices: a TPU topology such as v5e:16x16, or GPUs such as h100:8",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "slices", 1, "groups of such devices (TPU slices), or that they form (GPU nodes)", flag_values=values
    )
    flags.DEFINE_string("out", None, "JSON file of the numbers", flag_values=values)
    flags.DEFINE_boolean(
        "search",
        False,
        "also try batch and mesh sizes, a dozen at most; each compiles anew",
        flag_values=values,
    )
    return values


def run(values: flags.FlagValues) -> None:
    """Prints the numbers, and writes them where `--out` is given."""
    if not values.topology:
        raise ConfigError("--topology is missing; expected devices such as v5e:16x16, h100:8 or 8")
    config = read_config(values)
    out = Path(values.out) if values.out else None
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        found = "is a folder" if out.is_dir() else "its folder does not exist"
        raise ConfigError(f"--out={out}: {found}; expected a file to write")

    from dynrec_jax.compile import plan, search
    from dynrec_jax.compile.report import show, show_search
    from dynrec_jax.compile.topology import open_target
    from dynrec_jax.train.progress import Progress

    console = Console()
    target = open_target(values.topology, values.slices)
    with Progress("compiling", len(plan.PROGRAMS), unit="programs") as progress:
        result = plan.plan_run(config, target, progress)
    show(result, console)
    if values.search:
        with Progress("searching", search.MOST, unit="programs") as progress:
            progress.say(f"searching batch and mesh sizes: {search.MOST} compilations at most")
            result["search"] = search.search(
                config, target, lambda changed: plan.measure_step(changed, target), progress.say
            )
        show_search(result["search"], console)
    if out is not None:
        write(out, result)
        print(f"written to {out}")


def write(out: Path, result: dict[str, Any]) -> None:
    """Writes the JSON; raises MachineError where it cannot."""
    from dynrec_jax.files import write_whole

    try:
        write_whole(out, json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise MachineError(f"{out}: cannot be written ({error})") from None
