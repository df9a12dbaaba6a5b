"""Two processes of four devices each write what one process of eight writes, whatever is asked for."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ..commands import Made, make, small_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return small_run(tmp_path_factory)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another seed."""
    return make(tmp_path_factory.mktemp("other"), seed=1).workdir


@pytest.fixture(scope="module")
def candidates(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve items for each user but every third."""
    users = sorted(pd.read_parquet(made.dataset / "interactions")["user_id"])
    items = sorted(pd.read_parquet(made.dataset / "items")["item_id"])
    rows = [
        (user, items[(at + i) % len(items)]) for at, user in enumerate(users) if at % 3 for i in range(12)
    ]
    path = tmp_path_factory.mktemp("files") / "candidates.csv"
    pd.DataFrame(rows, columns=["user_id", "item_id"]).to_csv(path, index=False)
    return path


def score(made: Made, out: Path, flags: list[str], processes: int) -> list[tuple[int, str]]:
    """Exit status and what was said of each process; eight devices in all."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(8 // processes)}
    command = [
        sys.executable,
        "-m",
        "dynrec_jax",
        "score",
        f"--workdir={made.workdir}",
        f"--out={out}",
        *flags,
    ]
    started = [
        subprocess.Popen(
            command,
            env={**shared, **(several if processes > 1 else {}), "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    said = [process.communicate(timeout=300)[1] for process in started]
    return [(process.returncode, err) for process, err in zip(started, said, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--k=5", "--filter_seen", "--with={other}", "--diversify=0.5", "--pool=20"],
        ["--k=5", "--calibrate=0.9", "--pool=20", "--where=item_id <> 'i07'", "--format=jsonl"],
        ["--k=5", "--candidates={candidates}", "--encoder=int8", "--prune=0.2"],
        ["--what=both"],
        ["--what=neighbours", "--k=5"],
    ],
    ids=lambda flags: " ".join(flag.partition("=")[0] for flag in flags),
)
def test_two_processes_write_what_one_writes(
    flags: list[str], made: Made, other: Path, candidates: Path, tmp_path: Path
):
    flags = [flag.format(other=other, candidates=candidates) for flag in flags]
    for name, processes in (("one", 1), ("two", 2)):
        ended = score(made, tmp_path / name, flags, processes)
        assert [status for status, _ in ended] == [0] * processes, ended
    one, two = (read(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, frame in one.items():
        assert len(frame)
        assert list(frame.index) == list(two[name].index)
        for column in frame:
            assert_alike(list(frame[column]), list(two[name][column]))


def read(out: Path) -> dict[str, pd.DataFrame]:
    """Rows by id of each folder of parts."""
    found = {}
    for folder in (out, out / "users", out / "items"):
        tables = [pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))]
        for path in sorted(folder.glob("*.jsonl")):
            tables.append(pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()]))
        if tables:
            frame = pd.concat(tables)
            found[folder.name if folder != out else ""] = frame.set_index(frame.columns[0])
    return found


def assert_alike(one: list, two: list) -> None:
    """Numbers to rounding; of ids, a few may change places with equal ones."""
    if isinstance(one[0][0], str):
        assert np.mean([list(x) == list(y) for x, y in zip(one, two, strict=True)]) > 0.9
        return
    for x, y in zip(one, two, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_mistake_ends_all_processes_in_one_line_before_they_start(made: Made, tmp_path: Path):
    out = tmp_path / "out"
    for flags, told in (
        (["--users=nowhere.csv"], "nowhere.csv: no such file"),
        (["--table=int8"], "one of several"),
    ):
        for status, err in score(made, out, flags, 2):
            assert status == 2
            assert told in err.strip().splitlines()[-1]
    assert not out.exists()
