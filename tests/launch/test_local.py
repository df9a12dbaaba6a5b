"""`launch/local.sh`: several processes of one run, started again after a fault, and none of them left behind.

What the script does is seen with a `dynrec` that only pretends; runs that really train are killed in
`tests/invariants/test_local_kills.py`.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRETENDED = """#!/usr/bin/env bash
{trap}
echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS: $*" >> said
echo "$$" >> pids
start="$(grep -c "^$JAX_PROCESS_ID of" said)"
{behaviour}
"""
STOPPABLE = """trap 'echo "$JAX_PROCESS_ID stops" >> said; exit 75' TERM"""
STUBBORN = "trap '' TERM"
WAITS = "for _ in $(seq 600); do read -rt 0.1 <> <(:) || true; done"


class Pretended:
    """A copy of the script beside a `dynrec` with a given behaviour."""

    def __init__(self, folder: Path, behaviour: str, trap: str = ":"):
        self.folder = folder
        (folder / "launch").mkdir()
        for name in ("local.sh", "local.py"):
            shutil.copy(ROOT / "launch" / name, folder / "launch")
        (folder / "launch" / "environment.sh").write_text("")
        dynrec = folder / "bin" / "dynrec"
        dynrec.parent.mkdir()
        dynrec.write_text(PRETENDED.format(behaviour=behaviour, trap=trap))
        dynrec.chmod(0o755)
        self.process: subprocess.Popen[str] | None = None

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.process = subprocess.Popen(
            ["bash", "launch/local.sh", *arguments],
            cwd=self.folder,
            env={**os.environ, "PATH": path, "DYNREC_GRACE": "0.5", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.process

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Exit status, and what it said on standard error."""
        process = self.start(*arguments, **environment)
        _, err = process.communicate(timeout=60)
        self.nobody_is_left()
        return process.returncode, err

    def said(self) -> list[str]:
        return (self.folder / "said").read_text().splitlines()

    def wait_for(self, lines: int) -> None:
        deadline = time.monotonic() + 30
        while not (self.folder / "said").exists() or len(self.said()) < lines:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def pids(self) -> list[int]:
        return [int(line) for line in (self.folder / "pids").read_text().split()]

    def nobody_is_left(self) -> None:
        for pid in self.pids():
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_all_get_the_same_command_and_know_who_they_are(tmp_path: Path):
    made = Pretended(tmp_path, "exit 0")
    assert made.run("3", "score", "--out=a b", "--where=x <> 'it''s'")[0] == 0
    said = sorted(made.said())
    assert [line.partition(" at ")[0] for line in said] == ["0 of 3", "1 of 3", "2 of 3"]
    assert len({line.partition(" at ")[2] for line in said}) == 1
    assert said[0].endswith(": score --out=a b --where=x <> 'it''s'")


@pytest.mark.parametrize(("status", "verb"), [(2, "train"), (0, "train"), (1, "score"), (75, "evaluate")])
def test_what_is_not_started_again(tmp_path: Path, status: int, verb: str):
    made = Pretended(tmp_path, f"exit {status}")
    assert made.run("2", verb, "--workdir=w")[0] == status
    assert len(made.said()) == 2


@pytest.mark.parametrize("end", ["exit 1", "exit 75", "kill -KILL $$", "kill -ABRT $$"])
def test_a_training_that_fails_goes_on_until_it_is_through(tmp_path: Path, end: str):
    made = Pretended(
        tmp_path,
        f"""
        mkdir -p "w/checkpoints/$((start * 10))" "w/checkpoints/9.orbax-tmp"
        if [ "$start" -le 5 ] && [ "$JAX_PROCESS_ID" = "$((start % 2))" ]; then {end}; fi
        """,
    )
    status, err = made.run("2", "train", "--workdir=w", DYNREC_GRACE="20")
    assert status == 0
    assert len(made.said()) == 12
    assert [line.rpartition(" ")[2] for line in err.splitlines() if "starts again" in line] == [
        *("10", "20", "30", "40", "50")
    ]


def test_a_training_that_comes_no_further_is_given_up(tmp_path: Path):
    made = Pretended(tmp_path, "mkdir -p w/checkpoints/7; exit 1")
    status, err = made.run("1", "train", "--workdir=w", DYNREC_RESTARTS="2")
    assert status == 1
    assert len(made.said()) == 3, "the first brought a checkpoint"
    assert "local: status 1; 2 starts brought no new checkpoint" in err


def test_who_does_not_end_is_ended(tmp_path: Path):
    stubborn = (
        "[ $JAX_PROCESS_ID = 1 ] && exit 1; trap '' TERM; while true; do read -rt 1 <> <(:) || true; done"
    )
    made = Pretended(tmp_path, stubborn)
    began = time.monotonic()
    assert made.run("3", "score")[0] == 1
    assert time.monotonic() - began < 10


def test_a_stopped_process_is_ended_too(tmp_path: Path):
    made = Pretended(tmp_path, "[ $JAX_PROCESS_ID = 1 ] && kill -STOP $$; sleep 0.3; exit 75")
    assert made.run("2", "score")[0] == 75


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 75)])
def test_told_to_stop_it_tells_all_and_says_that_the_run_goes_on(
    tmp_path: Path, number: signal.Signals, status: int
):
    made = Pretended(tmp_path, WAITS, STOPPABLE)
    process = made.start("2", "train", "--workdir=w")
    made.wait_for(2)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == status
    assert sorted(made.said()[2:]) == ["0 stops", "1 stops"]
    made.nobody_is_left()


def test_told_to_stop_it_waits_for_a_while(tmp_path: Path):
    made = Pretended(tmp_path, WAITS, STUBBORN)
    process = made.start("2", "train", "--workdir=w", DYNREC_STOP="1")
    made.wait_for(2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    made.nobody_is_left()


def test_a_number_of_processes_is_asked_for(tmp_path: Path):
    made = Pretended(tmp_path, "exit 0")
    for number in ("", "0", "two", "-1"):
        process = made.start(number, "train")
        _, err = process.communicate(timeout=30)
        assert process.returncode == 2
        assert "expected a number of processes" in err
