"""Time and memory of a training step with BERT in it, by how many distinct items its batch has.

    python experiments/benchmarks/text.py --dataset=FOLDER --bert=FOLDER [--steps=8] [--batch=64]
        [--shares=0.5,0.2] [--from_layer=4] [--tokens=64] [--remat=none] [--cases=WORDS] [--out=FILE]

The dataset is one with the text columns `--columns` (title,brand,description: Amazon's), prepared by `dynrec prepare`.
The step is the one that `dynrec train` compiles, with item.fusion=both and the full softmax over the catalogue, fed by
the input pipeline. A case is a process of its own:

tuning    all of BERT, its layers from --from_layer on, or none of it (vectors made before, in a process of their own).
batch     of the data as they are; or with the batch's events dealt out over fewer items, --shares of their number,
          drawn from the whole catalogue anew at each step.
encodes   each distinct item once, as training does; or "every event": the text of every event of the batch, padding
          not counted, the same loss and gradient by the same step. It is what the sharing is measured against.

`ms` is the median of --steps steps behind a first one, each waited for; `core s` what they took of the cores, which
others on the machine disturb less. `peak` is the most resident memory that the process had (VmHWM), with Python, the
dataset, compilation and what malloc keeps. JSON with --out. --cases takes those alone whose label has one of some words
between bars: "batch 64|vectors".
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dynrec_jax.allocator import restart_with_kept_memory

WARM_UP = 1
Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One process.

    Attributes:
      tuning: "all", "upper", "none", or "vectors": those of a frozen BERT are made, no step is run.
      batch: histories.
      share: distinct items as a share of the batch's events; 0 leaves the batch as it is.
      every_event: whether each event's text is encoded.
    """

    tuning: str
    batch: int
    share: float = 0.0
    every_event: bool = False

    @property
    def label(self) -> str:
        """For the table."""
        if self.tuning == "vectors":
            return "vectors of the whole catalogue"
        dealt = f", {self.share:g} distinct" if self.share else ""
        how = ", every event" if self.every_event else ""
        return f"tunes {self.tuning}, batch {self.batch}{dealt}{how}"


def cases(batch: int, shares: Sequence[float]) -> list[Case]:
    """All of them; the vectors come first."""
    found = [Case("vectors", batch), Case("none", batch), Case("none", 2 * batch)]
    found += [Case(tuning, size) for tuning in ("upper", "all") for size in (batch, 2 * batch)]
    found += [Case("all", batch, share) for share in shares]
    return [*found, Case("all", batch, every_event=True)]


# --- a case, in its process --------------------------------------------------------------------------------------


def config_of(case: Case, arguments: argparse.Namespace) -> Any:
    """The config of a case."""
    from dynrec_jax.config import default_config, validate

    config = default_config()
    config.update_from_flattened_dict(
        {
            "dataset": arguments.dataset,
            "data.max_length": 50,
            "data.windows": "last",
            "model.heads": 1,
            "model.backward_weight": 0.0,
            "model.positions": "absolute",
            "model.dropout": 0.2,
            "train.average": 0.0,
            "train.weight_decay": 0.01,
            "item.fusion": "both",
            "item.text": tuple(arguments.columns.split(",")),
            "item.bert": arguments.bert,
            "item.text_tokens": arguments.tokens,
            "item.text_mode": "frozen" if case.tuning in ("none", "vectors") else "tuned",
            "item.text_from": arguments.from_layer if case.tuning == "upper" else 0,
            "train.batch_size": case.batch,
            "model.remat": arguments.remat,
        }
    )
    validate(config)
    return config


class Dealt:
    """A source of batches whose events are dealt out over fewer items."""

    def __init__(self, source: Any, share: float):
        self._source, self._share = source, share

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, step: Any) -> Any:
        batch = self._source[step]
        rng = np.random.default_rng(int(step))
        real = batch.items != 0
        distinct = max(round(self._share * real.sum()), 1)
        chosen = rng.choice(self._source.items, distinct, replace=False) + 1
        items = np.zeros_like(batch.items)
        items[real] = rng.permutation(np.resize(chosen, real.sum()))
        return batch._replace(items=items)


def run_case(case: Case, arguments: argparse.Namespace) -> Figures:
    """Runs the steps; the figures of the case."""
    import jax

    from dynrec_jax.data.cache import Histories
    from dynrec_jax.data.dataset import open_dataset
    from dynrec_jax.data.pipeline import BatchSource, make_splits
    from dynrec_jax.models.features import read_items
    from dynrec_jax.parallel.mesh import make_mesh, place_rows
    from dynrec_jax.train import loop
    from dynrec_jax.train.state import Given
    from dynrec_jax.train.step import Inputs
    from dynrec_jax.train.texts import TextBatches

    class EveryEvent(TextBatches):
        """The text of every event of a batch, as often as its item is there."""

        def _distinct(self, batch: Any) -> np.ndarray:
            items = np.sort(batch.items[batch.items != 0])
            lengths = self._text.lengths[items - 1]
            return items[np.argsort(lengths, kind="stable")][(lengths == 0).sum() :]

    config = config_of(case, arguments)
    config.data.cache_dir = str(Path(arguments.dataset).with_name("cache"))
    dataset, mesh = open_dataset(Path(arguments.dataset)), make_mesh()
    began = time.perf_counter()
    items = read_items(config, dataset)
    if case.tuning == "vectors":
        return {"seconds": time.perf_counter() - began, "items": dataset.items, "peak": peak_bytes()}
    histories = Histories(dataset, config.data.cache_dir)
    source: Any = BatchSource(histories, make_splits(histories, config), config)
    source = Dealt(source, case.share) if case.share else source
    made = loop.setup(config, items.model(config), mesh)
    state = made.fresh(Given(bert=None if items.text is None else items.text.weights))
    features = items.place(mesh)
    # Vectors of items that a batch has not are zeros here: to make them takes long and changes no step's time.
    kind = EveryEvent if case.every_event else TextBatches
    texts = None if items.text is None else kind(source, items.text, 1)
    seconds, cores, events, distinct, tokens, loss = [], [], [], [], [], 0.0
    for step in range(WARM_UP + arguments.steps):
        read = (texts or source)[step]
        batch, text = (read.batch, read.text) if texts else (read, ())
        events.append(int((batch.items != 0).sum()))
        distinct.append(len(np.unique(batch.items)) - 1)
        tokens.append(sum(part.ids.size for part in text))
        placed = jax.tree.map(lambda x: place_rows(mesh, x), (batch, text))
        began, used = time.perf_counter(), time.process_time()
        state, metrics = made.step(state, Inputs(placed[0], None, features, placed[1]))
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - began)
        cores.append(time.process_time() - used)
    kept = seconds[WARM_UP:]
    return {
        "ms": statistics.median(kept) * 1e3,
        "low_ms": min(kept) * 1e3,
        "high_ms": max(kept) * 1e3,
        "core_seconds": statistics.median(cores[WARM_UP:]),
        "events": statistics.mean(events),
        "distinct": statistics.mean(distinct),
        "tokens": statistics.mean(tokens),
        "loss": loss,
        "peak": peak_bytes(),
    }


def peak_bytes() -> int:
    """Most memory that this process has had resident."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# --- all of them -------------------------------------------------------------------------------------------------


def show(results: dict[str, Figures]) -> None:
    """The table."""
    table = Table(title="a training step with BERT in it", title_justify="left")
    for name in (
        "case",
        "events",
        "distinct",
        "share",
        "tokens",
        "ms",
        "from … to",
        "core s",
        "peak GB",
        "loss",
    ):
        table.add_column(name, justify="left" if name == "case" else "right", no_wrap=True)
    for label, row in results.items():
        peak = f"{row['peak'] / 1e9:.2f}"
        if "ms" not in row:
            table.add_row(
                label, "", f"{row['items']:,}", "", "", "", f"{row['seconds']:.1f} s in all", "", peak, ""
            )
            continue
        counts = f"{row['events']:,.0f}", f"{row['distinct']:,.0f}", f"{row['distinct'] / row['events']:.2f}"
        times = f"{row['ms']:,.0f}", f"{row['low_ms']:,.0f} … {row['high_ms']:,.0f}"
        rest = f"{row['core_seconds']:.2f}", peak, f"{row['loss']:.4f}"
        table.add_row(label, *counts, f"{row['tokens']:,.0f}", *times, *rest)
    Console(width=140).print(table)


def flags() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--bert", required=True)
    parser.add_argument("--columns", default="title,brand,description")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--shares", default="0.5,0.2")
    parser.add_argument("--from_layer", type=int, default=4, help="where the upper layers begin, from 0")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--remat", default="none", help="model.remat")
    parser.add_argument("--cases", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs one case, or all, each in a process."""
    arguments = flags()
    if arguments.case:
        print(json.dumps(run_case(Case(**json.loads(arguments.case)), arguments)))
        return
    words = [word for word in arguments.cases.split("|") if word]
    wanted = cases(arguments.batch, [float(share) for share in arguments.shares.split(",") if share])
    results: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        # Under a name in that folder, so that the vectors of a frozen BERT are made there, and made anew.
        dataset = Path(folder) / "dataset"
        dataset.symlink_to(Path(arguments.dataset).absolute(), target_is_directory=True)
        for case in wanted:
            if words and not any(word in case.label for word in words):
                continue
            own = [f"--case={json.dumps(dataclasses.asdict(case))}", f"--dataset={dataset}"]
            command = [sys.executable, __file__, *sys.argv[1:], *own]
            told = subprocess.run(command, capture_output=True, text=True)
            if told.returncode:
                raise SystemExit(f"{case.label}: {told.stderr}")
            results[case.label] = json.loads(told.stdout.splitlines()[-1])
            print(f"{case.label}: {results[case.label]}", file=sys.stderr, flush=True)
    show(results)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    restart_with_kept_memory()
    main()
