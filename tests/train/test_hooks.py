"""Hooks: what a checkpoint holds is in the log before it."""

from pathlib import Path
from typing import Any

from dynrec_jax.train.hooks import CheckpointHook, EvaluateHook, LogHook
from dynrec_jax.train.metrics_writer import MetricsWriter
from dynrec_jax.train.progress import Progress

from .. import tiny


class Recorder:
    """Stands in for checkpoints: notes what the log holds when a save starts."""

    def __init__(self, log: Path):
        self.log = log
        self.held: list[int] = []

    def save(self, *_: Any) -> bool:
        self.held.append(self.log.read_text().count('"loss"'))
        return True


def test_the_step_of_a_checkpoint_is_logged_before_it_is_saved(tmp_path: Path):
    """A run killed right after a save goes on behind that step, and would never log it."""
    config = tiny.config(logging__every=1, train__checkpoint_every=2)
    writer = MetricsWriter(tmp_path, 0, False)
    progress = Progress("test", 4)
    log = LogHook(config, writer, progress, 0)
    recorder = Recorder(tmp_path / "metrics.jsonl")
    evaluation = EvaluateHook(config, None, writer, {}, progress)
    save = CheckpointHook(config, recorder, evaluation, log)  # type: ignore[arg-type]
    for step in range(1, 5):
        metrics = {"loss": 1.0, "gradient_norm": 1.0}
        for hook in (log, evaluation, save):
            hook(step, None, metrics, step == 4)  # type: ignore[arg-type]
    writer.close()
    assert recorder.held == [2, 4]
    assert recorder.log.read_text().count('"loss"') == 4  # each step once
