"""The training loop: it starts, or goes on with, a run, and sequences step and hooks."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from dynrec_jax.config import describes_items, serves_neighbours, tunes_text
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.cold import cold_items
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.examples import Splits
from dynrec_jax.data.neighbours import FILE, count_neighbours, read_neighbours, write_neighbours
from dynrec_jax.data.pipeline import BatchSource, agreed, batches, make_splits
from dynrec_jax.evaluate.evaluator import Evaluator
from dynrec_jax.models import neighbours
from dynrec_jax.models.blocks import hidden_width
from dynrec_jax.models.features import Items, near_of, read_items
from dynrec_jax.models.model import MODELS, Model
from dynrec_jax.models.towers.ids import SEEN
from dynrec_jax.negatives import running_counts, sampling
from dynrec_jax.parallel.exchange import Exchange
from dynrec_jax.parallel.mesh import (
    Feed,
    device_memory,
    feed,
    place_rows,
    place_same,
    row_pieces,
    sum_of_parts,
    table_devices,
)
from dynrec_jax.parallel.processes import ALONE, Processes
from dynrec_jax.parallel.pulse import Pulse
from dynrec_jax.parallel.rules import sharding
from dynrec_jax.parallel.table import in_rows, rows_for
from dynrec_jax.train.attempts import Attempt, begin, check_current
from dynrec_jax.train.checkpoint import Checkpoints
from dynrec_jax.train.flops import Utilisation, training_cost
from dynrec_jax.train.hooks import CheckpointHook, EvaluateHook, Hook, LogHook, Watch, WatchHook
from dynrec_jax.train.metrics_writer import MetricsWriter, SilentWriter
from dynrec_jax.train.optimizer import make_optimizer, make_row_optimizer, make_schedule
from dynrec_jax.train.peak import peak_of_process
from dynrec_jax.train.plan import described, exchange_of_batches
from dynrec_jax.train.progress import Progress
from dynrec_jax.train.state import (
    Given,
    TrainState,
    abstract_state,
    average_decay,
    check_tables,
    fresh_state,
)
from dynrec_jax.train.step import CompiledStep, Inputs, StepSettings
from dynrec_jax.train.step_clock import SPENT, StepClock
from dynrec_jax.train.steps import Pace, StepFunction, StopHere, never, run, stopped
from dynrec_jax.train.texts import Read, TextBatches
from dynrec_jax.train.trace import TraceHook
from dynrec_jax.train.trackers import Trackers
from dynrec_jax.train.verified import steps

# Arrays of the table's size, itself included: Adam's moments, numbers of rows, and the average.
MOST_OF_A_ROW = 5


def train(
    config: ml_collections.ConfigDict,
    histories: Histories,
    folder: Path,
    mesh: Mesh,
    processes: Processes = ALONE,
    watch: Watch | None = None,
    stop_here: StopHere = never,
    saved: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Trains to the end, from the newest checkpoint in `folder/checkpoints` where there is one.

    Args:
      config: of the run.
      histories: of the shards that this process's part of the batches is drawn from.
      folder: the run folder, which all processes see; process 0 writes there what is written once.
      mesh: over the devices of all processes.
      processes: that train together.
      watch: is told after each step what was measured, and may end the run; in all processes alike.
      stop_here: is asked after each step, and between batches of an evaluation, whether the run has to stop there, to
        be gone on with later; in all processes alike.
      saved: is called when a checkpoint is on the disk.

    Returns:
      How the run stands: `step`, and `best`, `best_step` by the validation metric.

    Raises:
      NonFiniteLoss: naming the step.
      DataError: there are checkpoints, and none of them is good.
      MachineError: the disk is full at the end.
      Preempted: the run has stopped where it was told to, and is on the disk.
    """
    splits = make_splits(histories, config)
    own = feed(mesh, processes.index)
    source: BatchSource | TextBatches
    source = BatchSource(histories, splits, config, own.pieces, own.part, own.parts)
    exchange = exchange_of_batches(config, mesh, source, own, processes)
    with contextlib.ExitStack() as opened:
        shown = Progress("training", config.train.steps, quiet=not processes.first)
        progress_bar = opened.enter_context(shown)
        attempts: list[Attempt] = []  # of process 0
        newest = max(steps(folder / "checkpoints"), default=0)
        processes.first_does(lambda: attempts.append(begin(folder, newest, processes.count)))
        token = processes.exchange(attempts[0].token if attempts else "")[0]
        checkpoints = Checkpoints(
            folder / "checkpoints",
            config.train.keep_last,
            processes,
            progress_bar.say,
            lambda: check_current(folder, attempts[0]),
            f"{token}-",
        )
        opened.enter_context(contextlib.closing(checkpoints))
        _count(config, histories.dataset, folder, processes, progress_bar)
        items = _items(config, histories, folder, processes, progress_bar)
        model = items.model(config)
        made = setup(config, model, mesh, exchange)
        given = _given(config, items, histories, splits, mesh, own)
        start, standing = 0, {}
        with processes.pulse.at("restore"):
            found = checkpoints.resume(made.template)
        if found is None:
            state = made.fresh(given)
        else:
            state, progress = found
            start, standing = progress["step"], progress["standing"]
        processes.pulse.step = start
        progress_bar.goes_on(start)
        writer = (
            MetricsWriter(folder, start, Trackers(config, folder, start, progress_bar.say))
            if processes.first
            else SilentWriter()
        )
        opened.enter_context(contextlib.closing(writer))
        clock = StepClock(attempts[0].first if attempts else 0.0, writer.last(SPENT))
        running = training_counts(config, histories, splits, mesh, own)
        _announce(progress_bar, config, histories, source, state, start, processes, own, exchange)
        evaluator = _evaluator(config, histories, splits, model, mesh, processes, items)
        pulse = processes.pulse
        evaluation = EvaluateHook(config, evaluator, writer, standing, progress_bar, pulse, stop_here, clock)
        log = LogHook(
            config, writer, progress_bar, start, utilisation(config, model, state, processes), clock
        )
        watching = [] if watch is None else [WatchHook(watch, evaluation)]
        saving = CheckpointHook(config, checkpoints, evaluation, log, pulse, clock, saved)
        # Told before it is saved: a run that is killed between measures, and tells, again.
        trace = TraceHook(folder, processes.index, progress_bar)
        opened.enter_context(trace.listening())
        hooks: list[Hook] = [log, trace, evaluation, *watching, saving]
        step = start
        if start:
            _measure_owed(start, state, evaluation, saving)
        if start < config.train.steps and not standing.get("stopped"):
            if items.text is not None:
                source = _text_batches(config, source, items, own, processes)
            seen = {} if given.seen_Rx1 is None else {SEEN: given.seen_Rx1}
            near = _near(config, items, folder, mesh, processes)
            features = {**items.place(mesh), **seen, **near}
            stream = _placed_inputs(source, start, config.data.prefetch, mesh, processes, running, features)
            left = range(start, config.train.steps)
            refresh = _refresh(config, items, mesh, pulse)
            pace = Pace(pulse, clock, stop_here, saving)
            step = run(state, made.step, stream, refresh, hooks, left, progress_bar, pace)
        checkpoints.wait()
    return {"step": step, **standing}


def _measure_owed(step: int, state: TrainState, evaluation: EvaluateHook, saving: CheckpointHook) -> None:
    """Measures the state that a run stopped at, where that was interrupted; raises Preempted where it is again."""
    evaluation.owed(step, state)
    if evaluation.interrupted:
        raise stopped(step)
    if evaluation.value is not None:
        saving.measured_later(step)


def _items(
    config: ml_collections.ConfigDict,
    histories: Histories,
    folder: Path,
    processes: Processes,
    progress: Progress,
) -> Items:
    """The items and what describes them; what takes long, process 0 does, and the others find it in a file."""

    def read() -> Items:
        return read_items(config, histories.dataset, folder, say=progress.say)

    if processes.count > 1:
        processes.first_does(read)
    return processes.agree(read)


def _given(
    config: ml_collections.ConfigDict,
    items: Items,
    histories: Histories,
    splits: Splits,
    mesh: Mesh,
    own: Feed,
) -> Given:
    """BERT's first weights, and which items and words training sees, where a model makes a difference between them."""
    bert = None if items.text is None else items.text.weights
    if not describes_items(config):
        return Given(bert=bert)
    counts = sum_of_parts(mesh, own, training_counts_of(config, histories, splits))
    seen_Rx1 = in_rows(counts > 0, rows_for(items.number)).astype(np.int32)[:, None]
    unused = {tower.name: tower.unused(counts[1:] > 0) for tower in items.towers if tower.words}
    return Given(place_same(sharding(mesh, "items", None), seen_Rx1), bert, unused)


def _count(
    config: ml_collections.ConfigDict,
    dataset: Dataset,
    folder: Path,
    processes: Processes,
    progress: Progress,
) -> None:
    """Leaves a file of items that are near each other in the run folder, where loss or lists depend on it.

    Process 0 counts, of all histories, before the first start's first step.
    """

    def count() -> None:
        progress.say("counting which items are near each other")
        everybody = Histories(dataset, config.data.cache_dir)
        cold_N = cold_items(dataset.items, config.data.cold_items)
        users_E, items_E, _ = everybody.events_before(make_splits(everybody, config).train_end)
        kept_E = ~cold_N[items_E]
        write_neighbours(folder, count_neighbours(users_E[kept_E], items_E[kept_E], dataset.items))

    if config.loss.neighbours or serves_neighbours(config):
        processes.first_does(lambda: None if (folder / FILE).exists() else count())


def _near(
    config: ml_collections.ConfigDict, items: Items, folder: Path, mesh: Mesh, processes: Processes
) -> dict[str, jax.Array]:
    """Neighbours of all items, rows as the table's, where the loss shares targets with them."""
    if not config.loss.neighbours:
        return {}
    found = items.neighbours
    if found is None:  # what is served does not depend on them
        found = processes.agree(lambda: read_neighbours(folder, items.number))
    ids, weights = (array[:, : neighbours.TAUGHT] for array in (found.ids, found.weights))
    near = near_of(found._replace(ids=ids, weights=weights), mesh)
    return {neighbours.IDS: near.ids, neighbours.WEIGHTS: near.weights}


def _text_batches(
    config: ml_collections.ConfigDict, source: BatchSource, items: Items, own: Feed, processes: Processes
) -> TextBatches:
    """The batches with the text of their items; parts of a batch are planned alike."""
    assert items.text is not None
    made = TextBatches(source, items.text, own.pieces * max(config.train.accumulation, 1))
    made.plan(np.max(processes.exchange(made.planned), axis=0).tolist())
    return made


def _placed_inputs(
    source: BatchSource | TextBatches,
    start: int,
    prefetch: int,
    mesh: Mesh,
    processes: Processes,
    running: Any,
    features: Any,
) -> Iterator[Inputs]:
    """What the steps from `start` on read, where the devices want it."""
    stream = batches(source, start, prefetch)
    if processes.count > 1:
        stream = agreed(source, stream, start, processes.exchange)
    for read in stream:
        batch, text = read if isinstance(read, Read) else (read, ())
        batch, text = jax.tree.map(functools.partial(place_rows, mesh), (batch, text))
        yield Inputs(batch, running, features, text)


def _refresh(
    config: ml_collections.ConfigDict, items: Items, mesh: Mesh, pulse: Pulse
) -> Callable[[int, TrainState], TrainState]:
    """Before a step: the vectors of all texts are made anew where it is their turn, by the step's number alone."""

    def refresh(step: int, state: TrainState) -> TrainState:
        if items.text is None or step % config.item.text_refresh:
            return state
        with pulse.at("texts"):
            return state._replace(caches=items.encoded(state.params, mesh, state.caches))

    return refresh


class Setup(NamedTuple):
    """What a run starts from. A state as large as the devices hold is there once: fresh, or from a checkpoint.

    Attributes:
      template: the state's shapes, and where each leaf lies.
      fresh: makes the state of step 0, with what is `Given`, if anything.
      step: compiled when it is called.
    """

    template: TrainState
    fresh: Callable[..., TrainState]
    step: StepFunction


def setup(
    config: ml_collections.ConfigDict, model: Model, mesh: Mesh, exchange: Exchange | None = None
) -> Setup:
    """What a config's run starts from on a mesh."""
    fixed = step_arguments(config, model, mesh, exchange)
    parts, averaged = (model, fixed["tx"], fixed["row_tx"], mesh), average_decay(config) > 0
    template, shardings = abstract_state(*parts, averaged)
    step = CompiledStep(mesh, shardings, **fixed)

    def fresh(given: Given = Given()) -> TrainState:  # noqa: B008 # never changed
        return fresh_state(*parts, config.seed, shardings, given, averaged)

    return Setup(template, fresh, step)


def model_widths(config: ml_collections.ConfigDict) -> tuple[int, int, int]:
    """What of a model is divided over a mesh: D, heads, and hidden units."""
    m = config.model
    return m.dim, m.heads, hidden_width(m.block, m.dim, m.feedforward)


def check_fits(config: ml_collections.ConfigDict, items: int, mesh: Mesh) -> None:
    """Raises ConfigError where the id tables of a run cannot fit into its devices' memory; nothing is allocated."""
    if config.item.fusion == "text":
        return
    memory = device_memory()
    most = MOST_OF_A_ROW * rows_for(items) * config.model.dim * 4 // table_devices(mesh)
    if memory is not None and most > memory:  # to look closer takes half a second
        ids_alone = config.copy_and_resolve_references()
        ids_alone.item.fusion = "id"
        model = MODELS[config.model.name](ids_alone, items)
        optimizers = make_optimizer(config), make_row_optimizer(config)
        state, _ = abstract_state(model, *optimizers, mesh, average_decay(config) > 0)
        check_tables(state, items, mesh, memory)


def step_arguments(
    config: ml_collections.ConfigDict, model: Model, mesh: Mesh, exchange: Exchange | None
) -> dict[str, Any]:
    """The keyword arguments of `train_step`."""
    return {
        "model": model,
        "tx": make_optimizer(config),
        "row_tx": make_row_optimizer(config),
        "schedule": make_schedule(config),
        "settings": step_settings(config, model, mesh, exchange),
    }


def step_settings(
    config: ml_collections.ConfigDict, model: Model, mesh: Mesh, exchange: Exchange | None
) -> StepSettings:
    """What the config and the devices say of a step."""
    return StepSettings(
        seed=config.seed,
        accumulation=config.train.accumulation,
        clip_norm=config.train.clip_norm,
        sampling=sampling(config, model.abra.items),
        pieces=row_pieces(mesh) if mesh.devices.flat[0].platform == "cpu" else 0,
        exchange=exchange,
        average=average_decay(config),
    )


def utilisation(
    config: ml_collections.ConfigDict, model: Model, state: TrainState, processes: Processes
) -> Utilisation | None:
    """How the log tells what share of the peak of all processes is used; None where a peak is not known."""
    processes.exchange(None)  # so that processes of one machine measure at the same time, and share it
    peaks = processes.exchange(peak_of_process(config.model.dtype))
    if None in peaks:
        return None
    cost = training_cost(model, state.params, config.loss.negatives)
    return None if cost is None else Utilisation(cost, sum(peaks))


def training_counts_of(config: ml_collections.ConfigDict, histories: Histories, splits: Splits) -> np.ndarray:
    """int64[N + 1], training events of each item in these histories; none of items that are kept apart."""
    counts = histories.item_counts(splits.train_end)
    return np.where(cold_items(histories.dataset.items, config.data.cold_items), 0, counts)


def training_counts(
    config: ml_collections.ConfigDict, histories: Histories, splits: Splits, mesh: Mesh, own: Feed
) -> Any:
    """int32[R], running training counts, rows as the table's; None where no sampler needs them."""
    items = histories.dataset.items
    if config.loss.kind == "full" or not sampling(config, items).by_counts:
        return None
    counts = sum_of_parts(mesh, own, training_counts_of(config, histories, splits))
    return place_same(sharding(mesh, "items"), running_counts(counts, rows_for(items)))


def _evaluator(
    config: ml_collections.ConfigDict,
    histories: Histories,
    splits: Splits,
    model: Model,
    mesh: Mesh,
    processes: Processes,
    items: Items,
) -> Evaluator | None:
    if not any(processes.exchange(bool(len(splits.validation.users)))):
        return None
    return Evaluator(histories, splits, "validation", model, config, mesh, processes, items)


def _announce(
    progress: Progress,
    config: ml_collections.ConfigDict,
    histories: Histories,
    source: BatchSource,
    state: TrainState,
    start: int,
    processes: Processes,
    own: Feed,
    exchange: Exchange | None,
) -> None:
    dense = sum(x.size for x in jax.tree.leaves(state.params))
    rows = sum(x.size for x in jax.tree.leaves(state.tables))
    told = processes.exchange([source.trained_users if own.lead else 0, source.filled if own.lead else 0.0])
    trained_users = sum(each[0] for each in told)
    filled = sum(each[1] for each in told) / own.parts
    epochs = config.train.steps * config.train.batch_size * filled / trained_users
    progress.say(
        f"{trained_users:,} histories train, {histories.dataset.items:,} items; "
        f"{dense:,} dense weights, {rows:,} in tables; {config.train.steps:,} steps = {epochs:.1f} epochs; "
        f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
        + (f" in {processes.count} processes" if processes.count > 1 else "")
    )
    if filled < 1:
        progress.say(
            f"{1 - filled:.0%} of the dataset's {histories.dataset.shards} shards have nobody who trains, "
            "and that share of each batch stays empty; prepare with fewer --shards"
        )
    if exchange is not None:
        progress.say(described(exchange))
    if tunes_text(config) and (config.loss.kind == "full" or config.loss.sampler != "in_batch"):
        progress.say(
            "BERT is trained, and texts outside of a batch have old vectors without a gradient; if the loss does not "
            "fall, use loss.kind=sampled with loss.sampler=in_batch, whose negatives all have one"
        )
    if start:
        progress.say(f"going on from step {start}")
