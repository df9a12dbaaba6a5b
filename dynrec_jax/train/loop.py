"""The training loop: it starts, or goes on with, a run, and sequences step and hooks."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from dynrec_jax.batch import Batch
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.examples import NONE, Splits
from dynrec_jax.data.pipeline import BatchSource, batches, make_splits
from dynrec_jax.evaluate.evaluator import Evaluator
from dynrec_jax.models.bstm import MODELS, Bstm
from dynrec_jax.parallel.rules import sharding
from dynrec_jax.parallel.table import rows_for
from dynrec_jax.train.checkpoint import Checkpoints
from dynrec_jax.train.hooks import CheckpointHook, EvaluateHook, Hook, LogHook, Metrics
from dynrec_jax.train.metrics_writer import MetricsWriter
from dynrec_jax.train.optimizer import make_optimizer, make_row_optimizer, make_schedule
from dynrec_jax.train.progress import Progress
from dynrec_jax.train.state import TrainState, init_state
from dynrec_jax.train.step import StepSettings, compile_step

StepFunction = Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]


def train(
    config: ml_collections.ConfigDict, histories: Histories, folder: Path, mesh: Mesh
) -> dict[str, Any]:
    """Trains to the end, from the newest checkpoint in `folder/checkpoints` where there is one.

    Returns:
      How the run stands: `step`, and `best`, `best_step` by the validation metric.

    Raises:
      NonFiniteLoss: naming the step.
      DataError: the newest checkpoint is damaged.
      MachineError: the disk is full.
    """
    splits = make_splits(histories, config)
    source = BatchSource(histories, splits, config, multiple=mesh.size // mesh.shape["tensor"])
    model = MODELS[config.model.name](config, histories.dataset.items)
    state, step_fn = setup(config, model, mesh)
    with contextlib.ExitStack() as opened:
        checkpoints = Checkpoints(folder / "checkpoints", config.train.keep_last)
        opened.enter_context(contextlib.closing(checkpoints))
        start, standing = 0, {}
        if (latest := checkpoints.latest()) is not None:
            state, progress = checkpoints.restore(state, latest)
            start, standing = progress["step"], progress["standing"]
        writer = MetricsWriter(folder, start, config.logging.tensorboard)
        opened.enter_context(contextlib.closing(writer))
        running = running_counts(config, histories, splits)
        progress_bar = opened.enter_context(Progress("training", config.train.steps, start))
        _announce(progress_bar, config, histories, source, state, start)
        evaluator = _evaluator(config, histories, splits, model, mesh)
        evaluation = EvaluateHook(config, evaluator, writer, standing, progress_bar)
        log = LogHook(config, writer, progress_bar, start)
        hooks: list[Hook] = [log, evaluation, CheckpointHook(config, checkpoints, evaluation, log)]
        step = start
        if start < config.train.steps and not standing.get("stopped"):
            stream = _on_mesh(batches(source, start, config.data.prefetch), mesh)
            left = range(start, config.train.steps)
            step = run(state, step_fn, stream, running, hooks, left, progress_bar)
        checkpoints.wait()
    return {"step": step, **standing}


def setup(config: ml_collections.ConfigDict, model: Bstm, mesh: Mesh) -> tuple[TrainState, StepFunction]:
    """A fresh state on the mesh and the compiled step that goes with it."""
    tx, row_tx = make_optimizer(config), make_row_optimizer(config)
    state, shardings = init_state(model, tx, row_tx, mesh, config.seed)
    settings = StepSettings(
        seed=config.seed,
        accumulation=config.train.accumulation,
        clip_norm=config.train.clip_norm,
        negatives=config.loss.negatives,
        logq=config.loss.logq,
    )
    fixed = {
        "model": model,
        "tx": tx,
        "row_tx": row_tx,
        "schedule": make_schedule(config),
        "settings": settings,
    }
    return state, compile_step(mesh, shardings, **fixed)


def run(
    state: TrainState,
    step_fn: StepFunction,
    stream: Iterator[Batch],
    running: Any,
    hooks: Sequence[Hook],
    steps: range,
    progress: Progress,
) -> int:
    """Runs the steps and, after each, the hooks; returns how many steps the run has done."""
    for number in steps:
        state, metrics = step_fn(state, next(stream), running)
        done = number + 1
        last = done == steps.stop
        reasons = [hook(done, state, metrics, last) for hook in hooks]
        reason = next((reason for reason in reasons if reason), None)
        if reason and not last:
            progress.say(f"stopped after step {done}: {reason}")
            for hook in hooks:
                hook(done, state, metrics, True)
            return done
    return steps.stop


def running_counts(config: ml_collections.ConfigDict, histories: Histories, splits: Splits) -> Any:
    """int32[R] running training counts for the popularity sampler; None where it is not used."""
    if config.loss.kind != "sampled" or config.loss.sampler != "popularity":
        return None
    counts = histories.item_counts(splits.train_end)
    # Whole numbers below 2^31, so that each item has its exact place; at least one, so that it can be drawn.
    counts = np.maximum(counts // (counts.sum() // 2**30 + 1), 1)
    counts[0] = 0
    running_R = np.full(rows_for(histories.dataset.items), counts.sum())
    running_R[: len(counts)] = np.cumsum(counts)
    return jnp.asarray(running_R, jnp.int32)


def _on_mesh(stream: Iterator[Batch], mesh: Mesh) -> Iterator[Batch]:
    place = sharding(mesh, "batch", None)
    for batch in stream:
        yield Batch(*(jax.device_put(part, place) for part in batch))


def _evaluator(
    config: ml_collections.ConfigDict, histories: Histories, splits: Splits, model: Bstm, mesh: Mesh
) -> Evaluator | None:
    if not (splits.validation != NONE).any():
        return None
    return Evaluator(histories, splits, "validation", model, config, mesh)


def _announce(
    progress: Progress,
    config: ml_collections.ConfigDict,
    histories: Histories,
    source: BatchSource,
    state: TrainState,
    start: int,
) -> None:
    dense = sum(x.size for x in jax.tree.leaves(state.params))
    rows = sum(x.size for x in jax.tree.leaves(state.tables))
    epochs = config.train.steps * config.train.batch_size * source.filled / source.trained_users
    progress.say(
        f"{source.trained_users:,} histories train, {histories.dataset.items:,} items; "
        f"{dense:,} dense weights, {rows:,} in tables; {config.train.steps:,} steps = {epochs:.1f} epochs; "
        f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
    )
    if source.filled < 1:
        progress.say(
            f"{1 - source.filled:.0%} of the dataset's {histories.dataset.shards} shards have nobody who trains, "
            "and that share of each batch stays empty; prepare with fewer --shards"
        )
    if start:
        progress.say(f"going on from step {start}")
