"""A worker whose training is pretended, so that many can be killed in a minute: what it learns is a sum of its steps.

python pretend.py WORKDIR STORAGE GRACE, with the sweep in WORKDIR/sweep.json.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from dynrec_jax.files import held, write_whole
from dynrec_jax.sweep.definition import from_plain, read
from dynrec_jax.sweep.storage import Storage
from dynrec_jax.sweep.study import StudyLedger
from dynrec_jax.sweep.worker import Worker, end_on_signals

STEP_SECONDS = 0.05
METRIC = "ndcg@10"


def result(rate: float, seed: int, steps: int) -> float:
    """What a trial of so many steps measures: larger for rates near 0.01."""
    total = 0.0
    for step in range(1, steps + 1):
        total = 0.9 * total + 0.1 / (1.0 + 100 * abs(rate - 0.01)) + 1e-4 * ((seed * 7 + step * 3) % 5)
    return total


def train(config: Any, folder: Path, watch: Any) -> dict[str, Any]:
    """As `verbs.train.train`: goes on from the state in the folder, with a checkpoint after each fifth step."""
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "config.json").touch()
        kept = sorted(folder.glob("checkpoints/*"))
        start, total = json.loads(kept[-1].read_text()) if kept else (0, 0.0)
        rate, seed = config.train.learning_rate, config.seed
        if seed == 666:
            raise ArithmeticError("the loss is NaN")
        lines = (folder / "metrics.jsonl").read_text().splitlines(True) if start else []
        lines = [line for line in lines if json.loads(line)["step"] <= start]
        (folder / "metrics.jsonl").write_text("".join(lines))
        for step in range(start + 1, config.train.steps + 1):
            time.sleep(STEP_SECONDS)
            total = 0.9 * total + 0.1 / (1.0 + 100 * abs(rate - 0.01)) + 1e-4 * ((seed * 7 + step * 3) % 5)
            due = step % 5 == 0 or step == config.train.steps
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, f"validation/{METRIC}": total}) + "\n")
            reason = watch(step, total if due else None)
            if due:
                write_whole(folder / "checkpoints" / f"{step:04d}", json.dumps([step, total]))
            if reason:
                return {"step": step, "best": total, "best_step": step}
        return {"step": config.train.steps, "best": total, "best_step": config.train.steps}


def main(workdir: Path, storage: str, grace: float) -> None:
    """Works until everything is done."""
    sweep = from_plain(read(workdir / "sweep.json"), "sweep.json")
    ledger = StudyLedger(sweep, Storage(storage, grace), "pretended", workdir, grace)
    worker = Worker(sweep, ledger, workdir, train, grace / 6, lambda line: sys.stdout.write(line + "\n"))
    end_on_signals(worker)
    worker.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
