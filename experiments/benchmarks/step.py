"""Where the time of a training step goes, on CPU, GPU or TPU.

    python experiments/benchmarks/step.py [--config=FILE] [--config.KEY=VALUE …] [--steps=10] [--out=FILE]
        [--source=KIND:PATH | --dataset=FOLDER]

The step is the one that `dynrec train` compiles, fed by the input pipeline; the experiment file is
`experiments/default.py` unless another is given, and the data synthetic, of MovieLens-1M's size. Two tables: with the
data's own lengths, packed into rows as in training; and without waste by padding, with windows that are all full and
about as many targets in fewer rows. Each has, by part of the step:

ms        of a step, forward and backward together. What XLA joined into one instruction counts as the last thing it
          does. `input` is the time in which the device had nothing to do and the host was after the next batch;
          `idle` all other time with nothing to do: on CPU also that of single cores.
share     of the step.
products  ms of it in instructions that multiply matrices.
GFLOP     of those products as they are run: padding and what is computed twice count.
GFLOP/s   of the products while they run, and that in % of the peak, which is measured: on CPU as for the training
          log, in float32; on a GPU or TPU a product of two square matrices of the model's type, on each device.

The times are those of a few traced steps, taken relative to the time of a step without the trace, which is the median
over --steps. `utilisation` is what the model needs, three times the forward pass's products at real positions, over
time and peak. How events become times, and what is special about a CPU, `step_trace.py` says. For a GPU, give its
sizes, such as --config.model.dtype=bfloat16 --config.model.dim=1024 --config.model.layers=8
--config.data.max_length=4096; XLA_FLAGS=--xla_gpu_enable_command_buffer= keeps its kernels apart in the trace.
"""

import collections
import contextlib
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import step_trace
from absl import flags
from rich.console import Console
from rich.table import Table

from dynrec_jax.allocator import restart_with_kept_memory
from dynrec_jax.batch import Batch
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import open_dataset
from dynrec_jax.data.pipeline import BatchSource, batches, make_splits
from dynrec_jax.data.prepare import PrepareOptions, prepare
from dynrec_jax.errors import ConfigError, one_line, report_errors
from dynrec_jax.models.model import MODELS
from dynrec_jax.parallel.mesh import feed, make_mesh, place_rows
from dynrec_jax.train import loop, peak
from dynrec_jax.train.flops import training_cost
from dynrec_jax.train.step import Inputs
from dynrec_jax.verbs.experiment import define_config, read_config

SYNTHETIC = "synthetic:users=6040,items=3416,seed=0"
WARM_UP, TRACED = 3, 5  # steps
PEAK_SIZES = (4096, 8192)  # of the matrices whose product is the peak

# The first pattern found in an instruction's path, as `scopes` writes it, names its part.
PARTS = (
    ("dropout", r"/Dropout_\d+/"),
    ("projections", r"/attention/(query|key|value|out)/"),
    ("attention scores", r"/attention/"),
    ("norms", r"/(\w+_)?norm/"),
    ("feed-forward", r"/(up|down|gate|silu|relu)/|/block(s|_\d+)/mul/"),
    ("softmax", r"/softmax/"),
    ("lookup", r"/lookup/"),
    ("optimiser", r"/optimizer/"),
    # What has no scope of its own, told by where it stands.
    ("lookup", r"/(gather|scatter-add|add_any)/$"),
    ("sums of parts", r"^(?!.*/(gradient|Towers)/)"),
)
OTHER, INPUT, IDLE = "other", "input", "idle"
ROWS = (*dict.fromkeys(part for part, _ in PARTS), OTHER, INPUT, IDLE)

Figures = dict[str, Any]


class Counts(NamedTuple):
    """What a batch holds.

    Attributes:
      histories: windows.
      targets: positions with a target.
      attended: events that these positions look at, each at itself and what came before.
      filled: share of the positions that have a target.
    """

    histories: int
    targets: int
    attended: int
    filled: float


def count(batch: Batch) -> Counts:
    """Of a batch on the host."""
    real = (batch.segments[:, :-1] == batch.segments[:, 1:]) & (batch.segments[:, :-1] != 0)
    attended = int((batch.positions[:, :-1] + 1)[real].sum())
    return Counts(len(np.unique(batch.segments[:, :-1][real])), int(real.sum()), attended, float(real.mean()))


def full_windows(source: BatchSource, targets: int) -> Batch:
    """A batch with about as many targets, in rows of one full window each; items are those of the first batch."""
    width = source.width
    multiple = source.needed(range(0))  # what the number of rows divides by
    rows = max(round(targets / (width - 1) / multiple), 1) * multiple
    packed = source[0]
    items = np.resize(packed.items[packed.segments != 0], (rows, width))
    number, at = np.arange(1, rows + 1)[:, None], np.arange(width)[None, :]
    fields = Batch(items, 0 * items, 0 * items, *np.broadcast_arrays(number, at, width - 1 - at))
    return Batch(*(np.ascontiguousarray(x, np.int32) for x in fields))


def measure_peak(dtype: str) -> float:
    """FLOP/s of one device: on CPU that of the training log; elsewhere of a product of two large square matrices."""
    if jax.default_backend() == "cpu":
        return peak.measured()
    product = jax.jit(lambda a, b: a @ b)
    best = 0.0
    for size in PEAK_SIZES:
        x = jax.random.normal(jax.random.key(0), (size, size), dtype)
        jax.block_until_ready(product(x, x))
        for _ in range(5):
            began = time.perf_counter()
            jax.block_until_ready(product(x, x))
            best = max(best, 2.0 * size**3 / (time.perf_counter() - began))
    return best


# --- running -----------------------------------------------------------------------------------------------------


class Bench:
    """The step, its state, and what feeds it."""

    def __init__(self, config: ml_collections.ConfigDict, histories: Histories):
        self.config, self.items = config, histories.dataset.items
        m = config.mesh
        self.mesh = make_mesh(m.data, m.fsdp, m.tensor, m.slices, m.tables)
        own, splits = feed(self.mesh, 0), make_splits(histories, config)
        self.source = BatchSource(histories, splits, config, own.pieces, own.part, own.parts)
        model = MODELS[config.model.name](config, self.items)
        made = loop.setup(config, model, self.mesh)
        self.state, self.step = made.fresh(), made.step
        self.cost = training_cost(model, self.state.params, config.loss.negatives)
        self.running = loop.training_counts(config, histories, splits, self.mesh, own)

    def place(self, batch: Batch) -> Batch:
        """On the devices, as `train.loop` places it."""
        return Batch(*(place_rows(self.mesh, x) for x in batch))

    def run(self, stream: Iterator[Batch], steps: int) -> list[float]:
        """Seconds of each step but the first, from one's end to the next one's, none waited for but by its follower."""
        ends, pending = [], None
        for _ in range(steps):
            with jax.profiler.TraceAnnotation(step_trace.INPUT):
                batch = self.place(next(stream))
            self.state, metrics = self.step(self.state, Inputs(batch, self.running))
            if pending is not None:
                jax.block_until_ready(pending)
                ends.append(time.perf_counter())
            pending = metrics
        jax.block_until_ready(pending)
        return list(np.diff([*ends, time.perf_counter()]))

    def text(self, batch: Batch) -> str:
        """The compiler's text of the step for batches of this shape."""
        placed = self.place(batch).items
        shape = ",".join(map(str, placed.sharding.shard_shape(placed.shape)))
        # Asked of the runtime: it is the very program that runs, and to compile it again would take as long again.
        modules = [m for e in self.mesh.devices.flat[0].client.live_executables() for m in e.hlo_modules()]
        texts = [module.to_string() for module in modules]
        return max((t for t in texts if f"s32[{shape}]" in t.split("\n", 1)[0]), key=len)


def measure(bench: Bench, stream: Iterator[Batch], steps: int) -> tuple[list[float], step_trace.Usage]:
    """Seconds of the steps, and where the time of some more of them went."""
    bench.run(stream, WARM_UP)
    seconds = bench.run(stream, steps + 1)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            bench.run(stream, TRACED)
        return seconds, step_trace.read(Path(folder), cores())


def cores() -> int:
    """That XLA's pool has threads for."""
    return len(os.sched_getaffinity(0))


# --- parts -------------------------------------------------------------------------------------------------------


def scopes(path: str) -> str:
    """`jit(f)/transpose(jvp(Towers))/user/mul` -> `/f/Towers/user/mul/`; a scope `jvp()` without a name: `gradient`."""
    plain = []
    for scope in path.split(";")[0].split("/"):
        inner = scope
        while found := re.fullmatch(r"\w+\((.*)\)", inner):
            inner = found[1]
        plain.append(inner or "gradient")
    return f"/{'/'.join(plain)}/"


def part_of(path: str) -> str:
    """The part of the step that an instruction of this path belongs to."""
    if not path:
        return OTHER
    where = scopes(path)
    return next((part for part, pattern in PARTS if re.search(pattern, where)), OTHER)


def by_part(usage: step_trace.Usage, text: str, seconds: float, top: float) -> dict[str, Figures]:
    """A row of the table for each part, of one step that takes `seconds`."""
    known = step_trace.instructions(text)
    busy: dict[str, float] = collections.defaultdict(float)
    products: dict[str, float] = collections.defaultdict(float)
    flops: dict[str, float] = collections.defaultdict(float)
    devices = jax.device_count() if jax.default_backend() != "cpu" else 1
    for name, spent in usage.busy.items():
        path, each = known.get(name, step_trace.Instruction("", 0.0))
        part = part_of(path)
        busy[part] += spent
        if each:
            products[part] += spent
            flops[part] += each * usage.calls[name] / devices
    busy[INPUT], busy[IDLE] = usage.waited, usage.idle - usage.waited
    step = usage.seconds / TRACED
    rows = {}
    for part in ROWS:
        rate = flops[part] / products[part] * (step / seconds) if products[part] else 0.0
        rows[part] = {
            "ms": busy[part] / usage.seconds * seconds * 1e3,
            "share": busy[part] / usage.seconds,
            "products_ms": products[part] / usage.seconds * seconds * 1e3,
            "gflop": flops[part] / TRACED / 1e9,
            "gflop_per_second": rate / 1e9,
            "of_peak": rate / top,
        }
    return rows


def figures(bench: Bench, stream: Iterator[Batch], sample: list[Batch], steps: int, top: float) -> Figures:
    """Everything of one kind of batches, of which `sample` are like those of the stream."""
    seconds, usage = measure(bench, stream, steps)
    counts = [count(batch) for batch in sample]
    mean = Counts(*(statistics.mean(values) for values in zip(*counts, strict=True)))
    median = statistics.median(seconds)
    flops = bench.cost.of(mean.targets, mean.attended)
    devices = jax.device_count() if jax.default_backend() != "cpu" else 1
    return {
        "seconds": {"median": median, "low": min(seconds), "high": max(seconds)},
        "traced_seconds": usage.seconds / TRACED,
        "rows": sample[0].items.shape[0],
        "filled": mean.filled,
        "histories_per_second": mean.histories / median,
        "targets_per_second": mean.targets / median,
        "model_gflop": flops / 1e9,
        "utilisation": flops / median / (top * devices),
        "parts": by_part(usage, bench.text(sample[0]), median, top),
    }


def input_seconds(bench: Bench, number: int = 20) -> Figures:
    """Seconds of the host for one batch: to assemble it, and to copy it to the device."""
    taken: dict[str, list[float]] = {"assemble": [], "copy": []}
    for step in range(number):
        marks = [time.perf_counter()]
        batch = bench.source[step]
        marks.append(time.perf_counter())
        jax.block_until_ready(bench.place(batch))
        marks.append(time.perf_counter())
        for name, spent in zip(taken, np.diff(marks), strict=True):
            taken[name].append(float(spent))
    return {name: statistics.median(values) for name, values in taken.items()}


def show(console: Console, title: str, found: Figures) -> None:
    """Prints one table and the lines below it."""
    table = Table(
        "", "ms", "share", "products, ms", "GFLOP", "GFLOP/s", "of peak", title=title, title_justify="left"
    )
    for part, row in found["parts"].items():
        told = [f"{row['ms']:,.1f}", f"{row['share']:.1%}"]
        if row["gflop"]:
            told += [f"{row['products_ms']:,.1f}", f"{row['gflop']:,.1f}", f"{row['gflop_per_second']:,.0f}"]
            told += [f"{row['of_peak']:.0%}"]
        table.add_row(part, *told)
    rows = found["parts"].values()
    total = [f"{sum(row[name] for row in rows):,.1f}" for name in ("ms", "products_ms", "gflop")]
    table.add_row("step", total[0], "", *total[1:], end_section=True)
    console.print(table)
    seconds = found["seconds"]
    console.print(
        f"{seconds['median'] * 1e3:,.1f} ms a step ({seconds['low'] * 1e3:,.1f} to {seconds['high'] * 1e3:,.1f}; "
        f"traced {found['traced_seconds'] * 1e3:,.1f}), {found['rows']} rows, {found['filled']:.0%} of them real; "
        f"{found['histories_per_second']:,.0f} histories/s, {found['targets_per_second']:,.0f} targets/s; "
        f"the model needs {found['model_gflop']:,.1f} GFLOP: utilisation {found['utilisation']:.1%}\n"
    )


# --- flags -------------------------------------------------------------------------------------------------------


def read_flags(arguments: list[str]) -> flags.FlagValues:
    """The flags; raises ConfigError."""
    values = flags.FlagValues()
    define_config(values)
    flags.DEFINE_string("out", None, "JSON with all figures", flag_values=values)
    flags.DEFINE_string("source", SYNTHETIC, "KIND:PATH to prepare", flag_values=values)
    flags.DEFINE_string("dataset", None, "a dataset folder in place of --source", flag_values=values)
    flags.DEFINE_integer("steps", 10, "steps without the trace", lower_bound=2, flag_values=values)
    values.set_default("config", str(Path(__file__).resolve().parents[1] / "default.py"))
    try:
        rest = values(["step.py", *arguments])
    except flags.Error as error:
        raise ConfigError(one_line(error)) from None
    if len(rest) > 1:
        raise ConfigError(f"{rest[1]!r}: expected flags only, as --name=value")
    return values


@contextlib.contextmanager
def opened(values: flags.FlagValues) -> Iterator[tuple[ml_collections.ConfigDict, Histories]]:
    """The config, and the histories of the dataset that the flags name, prepared where it must be."""
    config = read_config(values)
    with tempfile.TemporaryDirectory() as folder:
        config.dataset = values["dataset"].value or str(Path(folder) / "dataset")
        if not values["dataset"].value:
            prepare(PrepareOptions(source=values["source"].value, out=config.dataset))
        cache = config.data.cache_dir or Path(folder) / "cache"
        yield config, Histories(open_dataset(Path(config.dataset)), cache)


def run(arguments: list[str]) -> int:
    """Measures, prints and writes."""
    if {"--help", "-h"} & {*arguments}:
        print(__doc__)
        return 0
    values, console = read_flags(arguments), Console(width=120, highlight=False)
    device = jax.devices()[0]
    with opened(values) as (config, histories):
        steps = values["steps"].value
        bench, top = Bench(config, histories), measure_peak(config.model.dtype)
        used = WARM_UP + steps + 1 + TRACED
        packed = [bench.source[step] for step in range(WARM_UP, used)]
        full = full_windows(bench.source, round(statistics.mean(count(batch).targets for batch in packed)))
        console.print(
            f"{device.platform} {device.device_kind}, {jax.device_count()} device(s), {cores()} cores, "
            f"{config.model.dtype}; peak {top / 1e9:,.0f} GFLOP/s"
        )
        result: Figures = {
            "device": device.device_kind,
            "platform": device.platform,
            "peak_gflop_per_second": top / 1e9,
        }
        stream = batches(bench.source, 0, config.data.prefetch)
        result["packed"] = figures(bench, stream, packed, steps, top)
        show(console, "The data's lengths, packed", result["packed"])
        result["full"] = figures(bench, itertools.repeat(full), [full], steps, top)
        show(console, "All windows full", result["full"])
        result["input_seconds"] = input_seconds(bench)
        told = ", ".join(
            f"{name} {seconds * 1e3:.2f} ms" for name, seconds in result["input_seconds"].items()
        )
        console.print(
            f"input, a batch, by the host: {told}; the device waited {result['packed']['parts'][INPUT]['ms']:.2f} ms"
        )
    if values["out"].value:
        Path(values["out"].value).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    restart_with_kept_memory()
    sys.exit(report_errors(lambda: run(sys.argv[1:])))
