"""The command line as a user meets it: a call, its exit status, what it said, and what it left on the disk."""

import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest

from dynrec_jax.cli import main
from dynrec_jax.data.cache import Histories
from dynrec_jax.files import temporary_name

from . import tiny

SOURCE = "synthetic:users=60,items=32,seed=0"
SHARDS = 4
STEPS = 6


class Made(NamedTuple):
    """A dataset folder, a run that was trained on it, and the experiment file of that run."""

    dataset: Path
    workdir: Path
    experiment: Path


def dynrec(verb: str, *switches: str, **values: Any) -> int:
    """Exit status of `dynrec VERB --name=value … --switch …`; `__` stands for the dot in `config.train.steps`.

    On one device: it compiles in half the time, and what a mesh changes is tested elsewhere.
    """
    named = [f"--{name.replace('__', '.')}={value}" for name, value in values.items()]
    one = {"devices": mock.Mock(return_value=jax.devices()[:1]), "device_count": mock.Mock(return_value=1)}
    with mock.patch.multiple(jax, **one):
        return main([verb, *named, *(f"--{name}" for name in switches)])


def experiment(path: Path, dataset: Path, **changes: Any) -> Path:
    """An experiment file with the small model of `tiny`; `changes` are keys with `__` for the dot."""
    keys = {name.replace("__", "."): value for name, value in changes.items()}
    values = {
        **tiny.SMALL,
        "dataset": str(dataset),
        "data.cache_dir": str(path.parent / "cache"),
        "model.backward_weight": 0.0,
        "evaluation.ks": (1, 5, 10, 20, 50, 100),
        "train.steps": STEPS,
        "train.checkpoint_every": STEPS // 2,
        "train.evaluate_every": STEPS,
        **keys,
    }
    path.write_text(
        "from dynrec_jax.config import default_config\n\n\n"
        "def get_config():\n"
        "    c = default_config()\n"
        f"    c.update_from_flattened_dict({values!r})\n"
        "    return c\n"
    )
    return path


def make(folder: Path, source: str = SOURCE, shards: int = SHARDS, **changes: Any) -> Made:
    """Prepares and trains in `folder`, by the commands alone."""
    dataset, workdir = folder / "dataset", folder / "workdir"
    assert dynrec("prepare", source=source, out=dataset, shards=shards) == 0
    config = experiment(folder / "experiment.py", dataset, **changes)
    assert dynrec("train", config=config, workdir=workdir) == 0
    return Made(dataset, workdir, config)


def small_run(factory: pytest.TempPathFactory) -> Made:
    """One small trained run for the whole session; tests may read it, never write to it."""
    return _small_run(factory.getbasetemp())


@functools.cache
def _small_run(folder: Path) -> Made:
    (folder / "small_run").mkdir()
    return make(folder / "small_run")


def a_shard_each(stored: Histories) -> list[range]:
    """Groups of users in place of `recommender.groups`, so that a job of a few users has several parts."""
    ends = np.cumsum(stored.shard_users)
    return [range(int(end - count), int(end)) for end, count in zip(ends, stored.shard_users, strict=True)]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that failed said: one line on standard error, in words and not in a traceback."""
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith("dynrec: ")
    assert "Traceback" not in err
    return err


def leftover(path: Path) -> Path:
    """Where a process of this machine that is no more would have begun to write a file."""
    name, _, _ = temporary_name(path).name.rpartition("-")
    return path.with_name(f"{name}-999999999")


def digest(folder: Path) -> dict[str, str]:
    """What lies in a folder: SHA-256 by relative name; folders that are empty count as well."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "/"
        for path in sorted(folder.rglob("*"))
    }
