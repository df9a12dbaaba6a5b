"""Training and scoring beside RecTools and SASRec in PyTorch: in turns, same data, same sizes, same cores.

    python experiments/benchmarks/peers.py [--out=FILE] [--source=KIND:PATH] [--rounds=3]
        [--peers=rectools,torch,torch-tuned,dynrec,dynrec-default,faiss] [--venv=FOLDER] [--warm_up=12] [--measured=40]

Sizes are those of MovieLens-1M, and `--source=sequences:FILE` takes that itself: 6,040 histories, 3,416 items, D 64,
2 layers, 2 heads, L 200, batch 128, dropout 0.2, softmax over the whole catalogue, forward traversal alone; the last
two events of each history are held out of training. All have SASRec's network, with a feed-forward of one D, but
`dynrec-default`, which has dynrec's own blocks: gated, with four times the weights in the feed-forward. `torch` is a
lean SASRec, one small file whose softmax is over real positions alone; `torch-tuned` is the same network with tricks
that are found in no peer, the streamed softmax and packing by length among them (`peers_torch.py`). Each peer runs in
processes of its own. RecTools and PyTorch come into a virtual environment of theirs, made where it is not there. What
is measured:

training  Histories a second over the measured steps, behind a warm-up (of dynrec, half as many steps as are measured,
          in which it compiles). dynrec: the rate that `dynrec train` writes to metrics.jsonl, its input pipeline
          included. torch: `peers_torch.py`, from ready tensors. rectools: `peers_rectools.py`, its loader included.
scoring   Users a second: the best 100 items after the whole history of every user, without those in it. dynrec: all
          that `dynrec score` does once the run is open (map the histories, digest the weights, make the lists, write
          Parquet with the source's ids), the second time in a process, since the peers too are timed after a first
          call; the first, which compiles, is in `rounds`. torch: from ready tensors to tensors. rectools: `recommend`,
          from its dataset to a table.
ranking   Users a second of the part that FAISS' exact flat index does too: from vectors of users and items to the best
          100 ids and scores, nothing left out. Both rank the same vectors, of the round's run of dynrec; `faiss` does
          nothing else (`peers_faiss.py`).
memory    The most that the process ever held, as the operating system counts it; of dynrec the larger of its two
          commands.

Each runs as its users run it: dynrec tells glibc's malloc to keep its memory (`dynrec_jax/allocator.py`), which the
others do not. Started with GLIBC_TUNABLES set as it is there, this gives all of them the same.

Prints medians and the spread over the rounds, and by how much dynrec is above each other, with the spread of the
rounds' ratios: `ratios` in the JSON that --out names, `default_ratios` those of `dynrec-default`. The JSON has the wall
time of whole commands too (`rounds`). A peer that cannot be installed, or fails, is named and left out, and the exit
status is 1.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
SIZES = {
    "dim": 64,
    "layers": 2,
    "heads": 2,
    "length": 200,
    "batch": 128,
    "dropout": 0.2,
    "learning_rate": 1e-3,
    "k": 100,
}
TORCH = {"torch": "2.13.0", "numpy": "1.26.4"}
RECTOOLS = {**TORCH, "rectools": "0.19.0", "pytorch-lightning": "2.5.2"}
# dynrec's networks: SASRec's, and its own.
NETWORKS = {
    "dynrec": {"model.block": "seed", "model.feedforward": 1.0},
    "dynrec-default": {"model.block": "prenorm", "model.feedforward": 4.0},
}
FAISS = {"faiss-cpu": "1.15.1", "numpy": "1.26.4"}
UNITS = {"training": "histories/s", "scoring": "users/s", "ranking": "users/s", "memory": "GB"}
LINES, DROPPED = 4, 2  # lines of metrics.jsonl that are measured, and those before: they hold the compilation
OURS = HERE / "peers_dynrec.py"
STOPWATCH = "DYNREC_BENCHMARK_STOPWATCH"  # where `peers_dynrec.py score` writes its seconds
SYNTHETIC = "synthetic:users=6040,items=3416,seed=0"

Measured = dict[str, Any]


class PeerFailed(Exception):
    """A peer could not be installed, or its process failed; the message says how."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all peers share.

    Attributes:
      folder: for everything temporary.
      settings: sizes and steps, as the peers' scripts read them.
      python: of the peers' virtual environment.
    """

    folder: Path
    settings: dict[str, Any]
    python: Path

    @property
    def dataset(self) -> Path:
        """The prepared dataset folder."""
        return self.folder / "dataset"

    @property
    def histories(self) -> Path:
        """Its histories as the peers read them."""
        return self.folder / "histories.npz"


def run(command: list[str], log: Path, **environment: str) -> tuple[float, float]:
    """Runs a command to its end; returns its wall time in seconds and its peak memory in GB.

    The kernel counts this process's own memory in until the child has become its program, so this one stays small.

    Raises:
      PeerFailed: with the last line of what it said.
    """
    began = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = said[-1] if said else "it said nothing"
        raise PeerFailed(f"{Path(command[0]).name} ended with {process.returncode}: {last}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9


def install(python: Path, packages: dict[str, str], log: Path) -> None:
    """Makes the virtual environment and installs what is not there; raises PeerFailed."""
    if not python.exists():
        run([sys.executable, "-m", "venv", str(python.parent.parent)], log)
    listed = [str(python), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    found = subprocess.run(listed, capture_output=True, check=True, text=True).stdout
    there = {each["name"].lower(): each["version"] for each in json.loads(found)}
    if any(there.get(name, "").split("+")[0] != version for name, version in packages.items()):
        wanted = [f"{name}{'[torch]' if name == 'rectools' else ''}=={v}" for name, v in packages.items()]
        run([str(python), "-m", "pip", "install", "--quiet", *wanted], log)


def prepare(bench: Bench, source: str) -> dict[str, Any]:
    """Prepares the dataset folder, writes its histories for the peers, and says what is in it."""
    run([*dynrec("prepare"), f"--source={source}", f"--out={bench.dataset}"], bench.folder / "prepare.log")
    from dynrec_jax.data.dataset import open_dataset
    from dynrec_jax.data.examples import leave_one_out

    dataset = open_dataset(bench.dataset)
    columns = [dataset.read_shard(shard).column("items").combine_chunks() for shard in range(dataset.shards)]
    if not all(len(column) for column in columns):
        # That part of each batch would be empty, and counted.
        raise SystemExit(f"{source}: too few users; each of {dataset.shards} shards must have one")
    lengths = np.concatenate([np.diff(column.offsets.to_numpy()) for column in columns]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    np.savez(
        bench.histories,
        items=np.concatenate([column.flatten().to_numpy() for column in columns]),
        starts=starts,
        train_ends=starts[:-1] + leave_one_out(lengths).train_end,
    )
    return {"source": source, "users": dataset.users, "items": dataset.items, "events": dataset.events}


def run_script(bench: Bench, peer: str, round_: int) -> Measured:
    """A peer whose script trains, scores and writes what it measured."""
    settings, result = bench.folder / "settings.json", bench.folder / f"{peer}-{round_}.json"
    settings.write_text(json.dumps({**bench.settings, "tuned": peer == "torch-tuned"}), encoding="utf-8")
    script = [HERE / f"peers_{peer.removesuffix('-tuned')}.py", bench.histories, settings, result]
    wall, memory = run([str(bench.python), *map(str, script)], result.with_suffix(".log"))
    measured = json.loads(result.read_text(encoding="utf-8"))
    return {**measured, "memory": memory, "seconds": wall}


def dynrec(verb: str) -> list[str]:
    """The console script, as users call it."""
    return [str(Path(sys.executable).with_name("dynrec")), verb]


def run_dynrec(bench: Bench, peer: str, round_: int) -> Measured:
    """`dynrec train`, then `dynrec score` under a stopwatch."""
    workdir, cache = bench.folder / f"{peer}-{round_}", bench.folder / "cache"
    every = bench.settings["measured"] // LINES
    steps = (DROPPED + LINES) * every
    changes = {
        "dataset": bench.dataset,
        "data.cache_dir": cache,
        "data.max_length": SIZES["length"],
        "model.dim": SIZES["dim"],
        "model.layers": SIZES["layers"],
        "model.heads": SIZES["heads"],
        "model.dropout": SIZES["dropout"],
        "model.backward_weight": 0,
        **NETWORKS[peer],
        "train.steps": steps,
        "train.batch_size": SIZES["batch"],
        "train.learning_rate": SIZES["learning_rate"],
        "train.evaluate_every": 0,
        "train.checkpoint_every": steps,
        "logging.every": every,
    }
    flags = [f"--config={HERE.parent / 'sasrec.py'}", f"--workdir={workdir}"]
    flags += [f"--config.{key}={value}" for key, value in changes.items()]
    train_wall, train_memory = run([*dynrec("train"), *flags], workdir.with_suffix(".train.log"))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "histories_per_second" in line][DROPPED:]
    k = min(SIZES["k"], bench.settings["items"])
    flags = [f"--workdir={workdir}", f"--out={workdir / 'scores'}", f"--k={k}", "--filter_seen"]
    flags += ["--step=last", f"--cache_dir={cache}"]
    watch = workdir / "stopwatch.json"
    score = [sys.executable, str(OURS), "score", *flags]
    wall, memory = run(score, workdir.with_suffix(".score.log"), **{STOPWATCH: str(watch)})
    watched = json.loads(watch.read_text(encoding="utf-8"))
    vectors = bench.folder / f"vectors-{round_}.npz"
    rank = [sys.executable, str(OURS), "rank", str(workdir), str(vectors), str(k)]
    run(rank, workdir.with_suffix(".rank.log"))
    return {
        # Each line is of as many histories, so the rate over all of them is the harmonic mean.
        "training": statistics.harmonic_mean([line["histories_per_second"] for line in logged]),
        "scoring": watched["users"] / watched["seconds"],
        "ranking": float(np.load(vectors)["rate"]),
        "memory": max(train_memory, memory),
        "loss": logged[-1]["loss"],
        "train": {"seconds": train_wall, "memory": train_memory},
        "score": {"seconds": wall, "memory": memory, "once open": watched},
        "versions": json.loads((workdir / "run.json").read_text(encoding="utf-8"))["versions"],
    }


def run_faiss(bench: Bench, peer: str, round_: int) -> Measured:
    """FAISS over the vectors of this round's run of dynrec."""
    vectors, result = bench.folder / f"vectors-{round_}.npz", bench.folder / f"{peer}-{round_}.json"
    if not vectors.exists():
        raise PeerFailed("there are no vectors to rank; dynrec comes before it")
    settings = bench.folder / "settings.json"
    settings.write_text(json.dumps(bench.settings), encoding="utf-8")
    script = [HERE / "peers_faiss.py", vectors, settings, result]
    wall, memory = run([str(bench.python), *map(str, script)], result.with_suffix(".log"))
    return {**json.loads(result.read_text(encoding="utf-8")), "memory": memory, "seconds": wall}


class Peer(NamedTuple):
    """How a peer is measured, and the packages that it needs."""

    measure: Callable[[Bench, str, int], Measured]
    packages: dict[str, str]


PEERS = {
    "rectools": Peer(run_script, RECTOOLS),
    "torch": Peer(run_script, TORCH),
    "torch-tuned": Peer(run_script, TORCH),
    **{peer: Peer(run_dynrec, {}) for peer in NETWORKS},
    "faiss": Peer(run_faiss, FAISS),
}


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summarise(rounds: dict[str, list[Measured]]) -> dict[str, Any]:
    """`training`, `scoring` and `memory` by peer, and the ratios of dynrec's two networks to the other peers."""
    summary: dict[str, Any] = {}
    for measure, unit in UNITS.items():
        values = {
            peer: [each[measure] for each in measured]
            for peer, measured in rounds.items()
            if all(measure in each for each in measured)
        }
        summary[measure] = {peer: {**spread(each), "unit": unit} for peer, each in values.items()}
        summary.setdefault("ratios", {})[measure] = ratios(values, "dynrec")
        summary.setdefault("default_ratios", {})[measure] = ratios(values, "dynrec-default")
    return summary


def ratios(values: dict[str, list[float]], ours: str) -> dict[str, dict[str, float]]:
    """Our value over each other peer's, with the spread of the rounds' ratios."""
    return {
        peer: {
            **spread([a / b for a, b in zip(values[ours], theirs, strict=True)]),
            "median": statistics.median(values[ours]) / statistics.median(theirs),
        }
        for peer, theirs in values.items()
        if ours in values and peer not in NETWORKS
    }


def show(console: Console, summary: dict[str, Any], peers: list[str]) -> None:
    """Prints the table."""
    table = Table("", *(f"{measure}, {unit}" for measure, unit in UNITS.items()))
    for peer in peers:
        table.add_row(peer, *(_told(summary[name].get(peer), 2 if name == "memory" else 0) for name in UNITS))
    table.add_section()
    for ours, found in (("dynrec", summary["ratios"]), ("dynrec-default", summary["default_ratios"])):
        for peer in found["memory"]:
            table.add_row(f"{ours} / {peer}", *(_told(found[name].get(peer), 2) for name in UNITS))
    console.print(table)


def _told(value: dict[str, float] | None, digits: int) -> str:
    if value is None:
        return ""
    return "{:,.{n}f} ({:,.{n}f}–{:,.{n}f})".format(value["median"], value["low"], value["high"], n=digits)


def machine() -> dict[str, Any]:
    """What it ran on."""
    told = Path("/proc/cpuinfo")
    names = [line for line in told.read_text().splitlines() if "model name" in line] if told.exists() else []
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": names[0].split(":", 1)[1].strip() if names else platform.processor(),
        "system": platform.platform(),
        "load before": os.getloadavg(),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES"),
    }


def read_flags() -> argparse.Namespace:
    """The flags; a mistake ends with one line and exit status 2."""
    from dynrec_jax.data.cache import default_cache_dir

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--source", default=SYNTHETIC)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=",".join(PEERS), help="in the order in which they run")
    parser.add_argument("--venv", type=Path, default=default_cache_dir() / "peers")
    parser.add_argument(
        "--warm_up", type=int, default=12, help="steps of rectools and torch before the clock"
    )
    parser.add_argument("--measured", type=int, default=40, help=f"steps, a multiple of {LINES}")
    flags = parser.parse_args()
    flags.peers = list(dict.fromkeys(flags.peers.split(",")))
    if unknown := set(flags.peers) - PEERS.keys():
        parser.error(f"--peers: {', '.join(sorted(unknown))}; expected some of {', '.join(PEERS)}")
    if flags.rounds < 1 or flags.warm_up < 1 or flags.measured < LINES or flags.measured % LINES:
        parser.error(f"expected rounds and warm_up of 1 or more, and measured a multiple of {LINES}")
    if flags.out and not flags.out.absolute().parent.is_dir():
        parser.error(f"--out: {flags.out.parent}: no such folder")
    return flags


def measure_in_turns(
    bench: Bench, peers: list[str], rounds: int, console: Console
) -> tuple[dict[str, list[Measured]], dict[str, str]]:
    """What each peer measured in each round, and why others are missing."""
    missing: dict[str, str] = {}
    for peer in peers:
        try:
            if PEERS[peer].packages:
                install(bench.python, PEERS[peer].packages, bench.folder / "install.log")
        except (PeerFailed, OSError, subprocess.SubprocessError) as error:
            missing[peer] = f"cannot be installed: {error}"
    done: dict[str, list[Measured]] = {peer: [] for peer in peers}
    for round_ in range(rounds):
        for peer in [each for each in peers if each not in missing]:
            try:
                measured = PEERS[peer].measure(bench, peer, round_)
            except PeerFailed as error:
                missing[peer] = f"failed: {error}"
                continue
            done[peer].append(measured)
            told = [f"{measured[name]:,.1f} {unit}" for name, unit in UNITS.items() if name in measured]
            told += [f"loss {measured['loss']:.2f}"] if "loss" in measured else []
            console.print(f"round {round_ + 1}: {peer}: {', '.join(told)}")
    return {peer: each for peer, each in done.items() if peer not in missing}, missing


def main() -> int:
    """Prepares the data, measures, prints and writes; returns 1 where a peer is missing."""
    flags, console = read_flags(), Console(width=160, highlight=False)
    about = {"date": f"{datetime.date.today()}", "machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), {}, flags.venv.absolute() / "bin" / "python")
        try:
            data = prepare(bench, flags.source)
        except PeerFailed as error:
            raise SystemExit(f"{flags.source}: {error}") from None
        steps = {"warm_up": flags.warm_up, "measured": flags.measured}
        bench.settings.update(**SIZES, **steps, items=data["items"], cores=about["machine"]["cores"])
        rounds, missing = measure_in_turns(bench, flags.peers, flags.rounds, console)
    summary = summarise(rounds)
    show(console, summary, list(rounds))
    for peer, why in missing.items():
        print(f"{peer} {why}", file=sys.stderr)
    if flags.out:
        result = {
            **summary,
            "missing": missing,
            "data": data,
            "settings": bench.settings,
            **about,
            "rounds": rounds,
        }
        flags.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
