"""Seconds from a command to the end of its first step, at the first start and at the second, by phase.

    python experiments/benchmarks/start.py --dataset=data/ml-1m [--config=experiments/default.py] [--rounds=3]
        [--out=FILE]

A round is `dynrec train` up to its first step, twice, each in a new process and a new run folder. The first starts with
an empty cache: it builds the memory-mapped histories and compiles; the second finds both. What the system keeps of
files in memory is warm in both. Medians; JSON with --out.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dynrec_jax.allocator import restart_with_kept_memory

BEGAN, MARKS = "DYNREC_START_BEGAN", "DYNREC_START_MARKS"
MODULES = ("jax", "dynrec_jax.verbs.train", "dynrec_jax.workdir", "dynrec_jax.train.loop")
Seconds = dict[str, float]


class Marks:
    """The phases of this process as they end."""

    def __init__(self) -> None:
        self._last = float(os.environ[BEGAN])
        self.seconds: Seconds = {}

    def end(self, phase: str) -> None:
        """What was done since the phase before has this name."""
        now = time.time()
        self.seconds[phase] = now - self._last
        self._last = now


def child(arguments: list[str]) -> int:
    """`dynrec` with its phases timed; writes them at the end of the first step."""
    restart_with_kept_memory()
    marks = Marks()
    marks.end("process, and its restart with kept memory")
    for name in MODULES:
        importlib.import_module(name)
    marks.end("imports")
    import jax

    from dynrec_jax.cli import main
    from dynrec_jax.train import loop

    setup = loop.setup

    def timed_setup(*given: Any) -> Any:
        marks.end("config, dataset, mapped histories")
        start = setup(*given)
        marks.end("shapes of the state")

        def fresh(*given: Any) -> Any:
            marks.end("checkpoints")
            state = start.fresh(*given)
            marks.end("initial state")
            return state

        def run(*state: Any) -> Any:
            marks.end("peak, evaluator, first batch")
            made = start.step(*state)
            marks.end("step: traced, compiled or read")
            jax.block_until_ready(made)
            marks.end("step: computed")
            Path(os.environ[MARKS]).write_text(json.dumps(marks.seconds), encoding="utf-8")
            os._exit(0)  # the run itself goes on for long

        return start._replace(fresh=fresh, step=run)

    loop.setup = timed_setup
    return main(arguments)


def start(folder: Path, number: int, config: str, dataset: str) -> Seconds:
    """One start in a run folder of its own; `folder` also holds the cache."""
    marks = folder / f"marks-{number}.json"
    flags = [f"--config={config}", f"--config.dataset={dataset}"]
    flags += [f"--workdir={folder / str(number)}", f"--cache_dir={folder / 'cache'}"]
    # A user's own settings of JAX's cache would take the place of ours.
    own = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    kept = {name: value for name, value in os.environ.items() if name not in own}
    environment = {**kept, BEGAN: str(time.time()), MARKS: str(marks)}
    told = subprocess.run(
        [sys.executable, __file__, "train", *flags], env=environment, capture_output=True, text=True
    )
    if told.returncode:
        raise SystemExit(told.stderr)
    return json.loads(marks.read_text(encoding="utf-8"))


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--config", default=str(Path(__file__).resolve().parents[1] / "default.py"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    starts: dict[str, list[Seconds]] = {"first": [], "second": []}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for number, name in enumerate(starts):
                starts[name].append(start(Path(folder), number, arguments.config, arguments.dataset))
    print(f"{'seconds':42s}{'first':>10s}{'second':>10s}")
    for phase in starts["first"][0]:
        row = [statistics.median(each[phase] for each in found) for found in starts.values()]
        print(f"{phase:42s}{row[0]:10.2f}{row[1]:10.2f}")
    totals = {name: [sum(each.values()) for each in found] for name, found in starts.items()}
    row = [statistics.median(found) for found in totals.values()]
    print(f"{'to the end of the first step':42s}{row[0]:10.2f}{row[1]:10.2f}")
    if arguments.out:
        result = {
            "config": arguments.config,
            "cores": len(os.sched_getaffinity(0)),
            "phases": starts,
            "totals": totals,
        }
        Path(arguments.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if BEGAN in os.environ:
        sys.exit(child(sys.argv[1:]))
    main()
