"""What a compressed model costs and saves: metrics, agreement with the exact lists, bytes, and users a second.

    JAX_PLATFORMS=cpu python experiments/benchmarks/compressed.py --workdir=DIR [--rounds=5] [--out=FILE]
    JAX_PLATFORMS=cpu python experiments/benchmarks/compressed.py --items=1000000 [--dim=64] [--out=FILE]

Of a run, all its test users are asked once for NDCG@10 and for the overlap of each list of 100 with that of the model
as it is; then some of them, all settings in turns, in one process, so that what the machine does beside it meets them
alike: users a second are medians. Without a run, the catalogue is as large as wanted and its vectors are random, with a
spectrum and lengths like those of trained ones (singular values fall as j^-0.45, lengths are log-normal about 1.6); the
memory of each table is then also measured by a process of its own.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dynrec_jax.config import default_config
from dynrec_jax.data.cache import Windows
from dynrec_jax.evaluate.compressed import CompressedRecommender, Compression
from dynrec_jax.evaluate.metrics import rank_counts, ranking_metrics, ranks
from dynrec_jax.evaluate.recommender import HistorySource, ListMaker, Lists, Recommender
from dynrec_jax.models.compressed import compressed_encoder, encoder_bytes, pruned
from dynrec_jax.models.features import Items
from dynrec_jax.models.model import MODELS, Model
from dynrec_jax.parallel.capacity import zipf
from dynrec_jax.parallel.compressed import compressed
from dynrec_jax.parallel.mesh import make_mesh
from dynrec_jax.parallel.table import ids_of, rows_for

K = 100
TABLES = (Compression(), Compression("bfloat16"), Compression("int8"))
ENCODERS = (
    Compression(encoder="bfloat16"),
    Compression(encoder="int8"),
    *(Compression(prune=share) for share in (0.1, 0.3, 0.5)),
    Compression("int8", "int8"),
)
OFFERED = (100, 110, 125, 150, 200, 400)  # candidates that are ranked again


class Subject(NamedTuple):
    """A model, and whom it is asked for."""

    model: Model
    params: Any
    tables: Any
    mesh: Any
    items: Items
    batch_size: int
    filter_seen: bool
    source: HistorySource
    users: np.ndarray
    ends: np.ndarray
    targets: np.ndarray | None

    def lists(self, setting: Compression, folder: Path, offered: int | None = None) -> ListMaker:
        """What makes its lists."""
        shared = self.model, self.mesh, self.batch_size, min(K, self.items.number), self.filter_seen
        named: dict[str, Any] = {"items": self.items}
        if not setting.any:
            return Recommender(*shared, **named).prepare(self.params, self.tables)
        named |= {"compression": setting, "folder": folder, "offered": offered}
        return CompressedRecommender(*shared, **named).prepare(self.params, self.tables)

    def ask(self, lists: ListMaker, users: int | None = None) -> Lists:
        """Lists of the first `users`, spread evenly over all, or of all."""
        step = 1 if users is None else max(len(self.users) // users, 1)
        return lists(self.source, self.users[::step][:users], self.ends[::step][:users])


class RandomHistories:
    """Histories of as many events each, of Zipf items."""

    def __init__(self, items: int, users: int, length: int):
        self.items_UxL = zipf(np.random.default_rng(1), items, (users, length)).astype(np.int32)

    def last_items(self, users_B: np.ndarray, ends_B: np.ndarray, size: int) -> np.ndarray:
        """The last `size` items; nothing of a user of -1."""
        found = np.zeros((len(users_B), size), np.int32)
        width = min(size, self.items_UxL.shape[1])
        found[:, :width] = np.where((users_B >= 0)[:, None], self.items_UxL[users_B, -width:], 0)
        return found

    def windows(self, users_B: np.ndarray, ends_B: np.ndarray, size: int) -> Windows:
        """The same items, without times."""
        items = self.last_items(users_B, ends_B, size)
        return Windows(items, np.zeros_like(items), np.zeros_like(items))

    def asked(self, users_B: np.ndarray, ends_B: np.ndarray) -> np.ndarray:
        """At no moment."""
        return np.zeros(len(users_B), np.int32)


def of_run(workdir: Path, cache_dir: str) -> Subject:
    """A trained model and its test users."""
    from dynrec_jax import workdir as workdirs
    from dynrec_jax.data.cache import Histories
    from dynrec_jax.data.pipeline import make_splits
    from dynrec_jax.evaluate.evaluator import asked

    run = workdirs.open(workdir)
    histories = Histories(run.dataset, cache_dir or run.config.data.cache_dir)
    users, ends = asked(make_splits(histories, run.config), "test")
    evaluation = run.config.evaluation
    return Subject(
        run.model, run.params, run.tables, run.mesh, run.items, evaluation.batch_size, evaluation.filter_seen,
        histories, users, ends, histories.item_at(users, ends),
    )  # fmt: skip


def random_table(items: int, dim: int) -> dict[str, jax.Array]:
    """Vectors of items with a spectrum like that of trained ones."""
    rng = np.random.default_rng(0)
    turned, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    mixed = (np.arange(1, dim + 1)[:, None] ** -0.45 * turned).astype(np.float32)
    rows = rows_for(items)
    table = np.empty((rows, dim), np.float32)
    for start in range(0, rows, 2**16):
        part = rng.standard_normal((min(2**16, rows - start), dim), np.float32) @ mixed
        length = 1.6 * np.exp(0.17 * rng.standard_normal((len(part), 1), np.float32))
        table[start : start + len(part)] = part * length / np.linalg.norm(part, axis=1, keepdims=True)
    id_R = ids_of(np.arange(rows), rows)
    table[(id_R < 1) | (id_R > items)] = 0.0
    return {"item_id": jnp.asarray(table)}


def of_random(items: int, dim: int, users: int) -> Subject:
    """A model whose weights and items are random."""
    c = default_config()
    c.data.max_length, c.model.dim = 50, dim
    model = MODELS[c.model.name](c, items)
    params = nn.meta.unbox(jax.jit(lambda key: MODELS[c.model.name](c, 10).init(key))(jax.random.key(0)))[
        "params"
    ]
    source, number = RandomHistories(items, users, c.data.max_length), np.arange(users)
    mesh = make_mesh(devices=jax.devices()[:1])
    return Subject(
        model, params, random_table(items, dim), mesh, Items(items), c.evaluation.batch_size, True,
        source, number, np.full(users, c.data.max_length), None,
    )  # fmt: skip


def overlap(one: Lists, other: Lists) -> float:
    """The mean share of a list's items that another of the same user has as well."""
    shares = [
        len(np.intersect1d(a[a > 0], b[b > 0])) / max((a > 0).sum(), 1)
        for a, b in zip(one.ids, other.ids, strict=True)
    ]
    return float(np.mean(shares))


def ndcg(subject: Subject, lists: Lists) -> float | None:
    """NDCG@10, where there are targets."""
    if subject.targets is None:
        return None
    counts = rank_counts(ranks(lists.ids, subject.targets), lists.ids.shape[1])
    return float(ranking_metrics(counts, (10,))["ndcg@10"])


def table_bytes(subject: Subject, setting: Compression) -> int:
    """Of the table that is ranked."""
    shape = jax.ShapeDtypeStruct((rows_for(subject.items.number), subject.model.abra.dim), jnp.float32)
    made = (
        shape if setting.table == "float32" else jax.eval_shape(lambda x: compressed(x, setting.table), shape)
    )
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made))


def measured(
    subject: Subject, settings: tuple[Compression, ...], rounds: int, timed: int, folder: Path
) -> list:
    """A row for each setting; the first is the model as it is."""
    makers = {setting: subject.lists(setting, folder) for setting in settings}
    whole = {setting: subject.ask(lists) for setting, lists in makers.items()}
    exact = whole[settings[0]]
    rates: dict[Compression, list[float]] = {setting: [] for setting in settings}
    for number in range(rounds + 1):
        for setting, lists in makers.items():
            began = time.perf_counter()
            made = subject.ask(lists, timed)
            if number:  # the first compiles what is left
                rates[setting].append(len(made.ids) / (time.perf_counter() - began))
    best, rows = ndcg(subject, exact), []
    for setting in settings:
        found = ndcg(subject, whole[setting])
        weights = compressed_encoder(pruned(subject.params, setting.prune), setting.encoder)
        rows.append({
            "setting": setting.name or "as trained",
            "ndcg@10": found,
            "loss_percent": None if found is None or not best else 100 * (1 - found / best),
            "overlap@100": overlap(exact, whole[setting]),
            "table_bytes": table_bytes(subject, setting),
            "table_share": table_bytes(subject, setting) / table_bytes(subject, settings[0]),
            "encoder_bytes": encoder_bytes(weights),
            "users_per_second": statistics.median(rates[setting]) if rates[setting] else None,
        })  # fmt: skip
    return rows


def by_candidates(subject: Subject, users: int, folder: Path) -> list[dict[str, Any]]:
    """The overlap by how many candidates are ranked again."""
    exact = subject.ask(subject.lists(Compression(), folder), users)
    rows = []
    for kind in ("bfloat16", "int8"):
        for offered in OFFERED:
            made = subject.ask(
                subject.lists(Compression(kind), folder, min(offered, subject.items.number)), users
            )
            rows.append({"table": kind, "candidates": offered, "overlap@100": overlap(exact, made)})
    return rows


def status(name: str) -> int:
    """A number of this process's memory, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


def memory(items: int, dim: int, setting: Compression, queue: Any) -> None:
    """In a process of its own: what is held once lists can be made, and the most while they are."""
    before = status("RssAnon")
    subject = of_random(items, dim, 256)
    with tempfile.TemporaryDirectory() as folder:
        lists = subject.lists(setting, Path(folder))
        if setting.table != "float32":
            for table in subject.tables.values():
                table.delete()
        arrays = sum(x.nbytes for x in jax.live_arrays())
        held, file = status("RssAnon") - before, status("RssFile")
        with Path("/proc/self/clear_refs").open("w", encoding="ascii") as refs:
            refs.write("5")  # the most that was held counts from here
        subject.ask(lists)
        queue.put({
            "setting": setting.name or "as trained",
            "live_arrays": arrays,
            "held": held,
            "most_resident": status("VmHWM"),
            "of_files": status("RssFile") - file,
        })  # fmt: skip


def measured_memory(items: int, dim: int, setting: Compression) -> dict[str, Any]:
    """`memory`, from a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=memory, args=(items, dim, setting, queue))
    process.start()
    found: dict[str, Any] = queue.get(timeout=600)
    process.join()
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """A line for each row."""
    for row in rows:
        told = [f"{name} {_told(name, value)}" for name, value in row.items() if name != "setting"]
        print(f"{row.get('setting', '')!s:28} {'  '.join(told)}", flush=True)


def _told(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if name == "users_per_second" else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--users", type=int, default=1024, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache_dir", default="")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    settings, result = TABLES, {}
    if arguments.workdir is not None:
        subject = of_run(arguments.workdir, arguments.cache_dir)
        settings = TABLES + ENCODERS
    else:
        result["memory"] = [measured_memory(arguments.items, arguments.dim, setting) for setting in TABLES]
        show(result["memory"])
        subject = of_random(arguments.items, arguments.dim, arguments.users)
    with tempfile.TemporaryDirectory() as folder:
        result["settings"] = measured(subject, settings, arguments.rounds, arguments.users, Path(folder))
        show(result["settings"])
        result["candidates"] = by_candidates(subject, min(arguments.users, 256), Path(folder))
        show(result["candidates"])
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
