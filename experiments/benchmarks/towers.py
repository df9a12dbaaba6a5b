"""What each kind of item tower is worth where it carries the signal, and what it costs where it is noise.

    python experiments/benchmarks/towers.py [--seeds=3] [--fusions=id,both] [--out=FILE]
        [--kinds=attributes,triples,vectors]

A made-up log: 600 users walk among 1,000 items of 50 groups, six training events a user, so that an item has 3.6 of
them and its id alone can hardly learn which group it is of. An attribute tells the group (beside two that say nothing),
or a triple does (beside one that says nothing), or a vector (its group's, and noise of the same length). "noise" is the
same with the rows of each file shuffled over the items: it says as much of an item, and what it says is wrong. Users,
items and steps are the same everywhere. Test ndcg@10 of the checkpoint that validation chooses; mean and standard
deviation over seeds of the model, the data have one seed. `gain` is paired: the mean over seeds of the difference to
ids alone, and the standard error of that. Five minutes on two cores. JSON with --out.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from dynrec_jax.allocator import restart_with_kept_memory

USERS, ITEMS, GROUPS, EVENTS = 600, 1_000, 50, 8  # events of a user, the validation and test targets included
STAYS = 0.8  # chance that the next item is of the same group
OTHERS = 40  # attributes and entities that say nothing of the group
WIDTH = 16  # numbers of a vector
METRIC = "ndcg@10"
KINDS = {
    "attributes": {"item.attributes": ("attributes",)},
    "triples": {"item.triples": True},
    "vectors": {"item.vectors": ("vector",)},
}
SETTINGS = {
    "data.max_length": EVENTS,
    "model.dim": 32,
    "model.layers": 1,
    "model.heads": 1,
    "model.backward_weight": 0.0,
    "model.positions": "absolute",
    "model.dropout": 0.2,
    "train.steps": 600,
    "train.batch_size": 128,
    "train.learning_rate": 3e-3,
    "train.average": 0.0,
    "train.weight_decay": 0.01,
    "train.evaluate_every": 100,
    "train.checkpoint_every": 100,
    "train.keep_last": 1,
    "logging.every": 100,
    "evaluation.ks": (10,),
}


class World(NamedTuple):
    """The log and what is told of the items.

    Attributes:
      histories: items of each user, oldest first.
      attributes: of each item.
      triples: relation and tail, of each item.
      vectors: float[N, WIDTH].
    """

    histories: list[list[int]]
    attributes: list[list[str]]
    triples: list[list[tuple[str, str]]]
    vectors: np.ndarray


def make_world(seed: int) -> World:
    """Draws it: no user meets an item twice."""
    rng = np.random.default_rng(seed)
    group_N = np.arange(ITEMS) % GROUPS
    histories = [walk(rng, group_N) for _ in range(USERS)]
    attributes, triples = [], []
    for group in group_N:
        one, two, three = rng.choice(OTHERS, 3, replace=False)
        attributes.append([f"other{one}", f"group{group}", f"other{two}"])
        triples.append([("is_in", f"group{group}"), ("made_by", f"other{three}")])
    centre_GxE = rng.normal(size=(GROUPS, WIDTH))
    return World(histories, attributes, triples, centre_GxE[group_N] + rng.normal(size=(ITEMS, WIDTH)))


def walk(rng: np.random.Generator, group_N: np.ndarray) -> list[int]:
    """One user's items."""
    history: list[int] = []
    group = rng.integers(GROUPS)
    for _ in range(EVENTS):
        if rng.random() > STAYS:
            group = rng.integers(GROUPS)
        history.append(int(rng.choice(np.setdiff1d(np.flatnonzero(group_N == group), history))))
    return history


def write(world: World, folder: Path, shuffled: bool) -> Path:
    """The log's files and the dataset made of them."""
    from dynrec_jax.data.prepare import PrepareOptions, prepare

    folder.mkdir()
    order_N = np.random.default_rng(1).permutation(ITEMS) if shuffled else np.arange(ITEMS)
    lines = [f"{user} " + " ".join(map(str, items)) for user, items in enumerate(world.histories)]
    (folder / "sequences.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (folder / "items.jsonl").open("w", encoding="utf-8") as file:
        for item, told in enumerate(order_N):
            row = {
                "item_id": str(item),
                "attributes": world.attributes[told],
                "vector": world.vectors[told].tolist(),
            }
            file.write(json.dumps(row) + "\n")
    with (folder / "triples.tsv").open("w", encoding="utf-8") as file:
        file.write("head\trelation\ttail\n")
        file.writelines(
            f"{item}\t{r}\t{t}\n" for item, told in enumerate(order_N) for r, t in world.triples[told]
        )
    options = PrepareOptions(
        source=f"sequences:{folder / 'sequences.txt'}",
        out=folder / "dataset",
        items=folder / "items.jsonl",
        triples=folder / "triples.tsv",
        shards=8,
    )
    prepare(options, Console(file=io.StringIO()))
    return folder / "dataset"


def measure(dataset: Path, changes: dict[str, Any], workdir: Path, cache_dir: Path) -> dict[str, float]:
    """Trains with `changes` to the settings; the metrics of the best checkpoint on test, and the last loss."""
    from dynrec_jax.config import default_config, validate
    from dynrec_jax.verbs.evaluate import measure as measure_run
    from dynrec_jax.verbs.train import train

    config = default_config()
    config.update_from_flattened_dict({**SETTINGS, "dataset": str(dataset), **changes})
    validate(config)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(config, workdir, str(cache_dir))
        found = measure_run(workdir, "test", cache_dir=str(cache_dir))
    last = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["loss"] for row in map(json.loads, last) if "loss" in row]
    return {
        METRIC: found[METRIC],
        "step": found["step"],
        "loss": losses[-1],
        "popularity": found["baselines"]["popularity"][METRIC],
    }


def cases(fusions: list[str], kinds: list[str]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What is trained: (fusion, kind, "signal" or "noise") and the changes to the settings."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {("id", "", ""): {}}
    for fusion in fusions:
        for kind in kinds:
            for what in ("signal", "noise"):
                found[fusion, kind, what] = {"item.fusion": fusion, **KINDS[kind]}
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All cases, a seed after the other."""
    world = make_world(0)
    fusions = [fusion for fusion in arguments.fusions.split(",") if fusion != "id"]
    wanted = cases(fusions, arguments.kinds.split(","))
    results: dict[str, Any] = {" ".join(filter(None, case)): [] for case in wanted}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        datasets = {what: write(world, folder / what, what == "noise") for what in ("signal", "noise")}
        for seed in range(arguments.seeds):
            for case, changes in wanted.items():
                label = " ".join(filter(None, case))
                dataset = datasets[case[2] or "signal"]
                workdir = folder / f"{label} {seed}".replace(" ", "-")
                began = time.perf_counter()
                found = measure(dataset, {**changes, "seed": seed}, workdir, folder / "cache")
                results[label].append({**found, "seconds": time.perf_counter() - began})
                print(f"seed {seed}, {label}: {found}", flush=True)
    return results


def show(results: dict[str, Any]) -> None:
    """The table."""
    table = Table(
        title=f"test {METRIC} over {len(results['id'])} seeds; popularity {results['id'][0]['popularity']:.4f}"
    )
    for name in ("items", "mean", "deviation", "gain", "its error", "last loss", "best step"):
        table.add_column(name, justify="left" if name == "items" else "right")
    alone = [each[METRIC] for each in results["id"]]
    for label, found in results.items():
        values = [each[METRIC] for each in found]
        gains = [value - own for value, own in zip(values, alone, strict=True)]
        error = deviation(gains) / len(gains) ** 0.5
        loss, step = (statistics.mean(each[name] for each in found) for name in ("loss", "step"))
        told = (
            f"{statistics.mean(values):.4f}",
            f"{deviation(values):.4f}",
            f"{statistics.mean(gains):+.4f}",
            f"{error:.4f}",
        )
        table.add_row(label, *told, f"{loss:.3f}", f"{step:.0f}")
    Console(width=120).print(table)


def deviation(values: list[float]) -> float:
    """Of a sample; 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fusions", default="id,both", help="of id, text, both and ensemble")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = run(arguments)
    show(results)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    restart_with_kept_memory()
    main()
