"""Damage to a checkpoint on the disk: no wrong value is ever restored, and what is good is used."""

import gc
import hashlib
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynrec_jax.train import manifest
from dynrec_jax.train.checkpoint import Checkpoints, open_model
from dynrec_jax.train.state import TrainState

from . import checkpoints as small
from .checkpoints import equal

STEPS = (3, 6, 9)
ROWS = 1024
OLDER, NEWEST = STEPS[-2:]
Damage = Callable[[random.Random, Path, Path], str]


def state_of(step: int) -> TrainState:
    return small.state_of(step, ROWS)


def abstract() -> dict[str, Any]:
    return small.abstract(ROWS)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with three checkpoints."""
    run = tmp_path_factory.mktemp("healthy") / "run"
    checkpoints = Checkpoints(run / "checkpoints", keep_last=3)
    for step in STEPS:
        checkpoints.save(state_of(step), step, {"step": step}, None)
    checkpoints.close()
    return run


def files(checkpoint: Path) -> list[Path]:
    """By folder and size: many are named at random."""
    found = (path for path in checkpoint.rglob("*") if path.is_file())
    return sorted(found, key=lambda path: (path.parent, path.stat().st_size, path.name))


def flip(draw: random.Random, newest: Path, _: Path) -> str:
    """Of all bits of the checkpoint, any one."""
    place = draw.randrange(sum(path.stat().st_size for path in files(newest)))
    for path in files(newest):
        if place < path.stat().st_size:
            content = bytearray(path.read_bytes())
            content[place] ^= 1 << draw.randrange(8)
            path.write_bytes(content)
            return f"bit of byte {place} of {path.relative_to(newest)}"
        place -= path.stat().st_size
    raise AssertionError


def zero(draw: random.Random, newest: Path, _: Path) -> str:
    path = draw.choice(files(newest))
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    path.write_bytes(content)
    return f"zeros from {start} in {path.relative_to(newest)}"


def truncate(draw: random.Random, newest: Path, _: Path) -> str:
    path = draw.choice(files(newest))
    size = draw.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    return f"{path.relative_to(newest)} cut to {size}"


def delete(draw: random.Random, newest: Path, _: Path) -> str:
    path = draw.choice(files(newest))
    path.unlink()
    return f"{path.relative_to(newest)} deleted"


def swap(draw: random.Random, newest: Path, _: Path) -> str:
    one, other = draw.sample(files(newest), 2)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return f"{one.relative_to(newest)} and {other.relative_to(newest)} swapped"


def older_file(draw: random.Random, newest: Path, older: Path) -> str:
    """Where the older checkpoint has no file of that name, the one that takes its place."""
    number = draw.randrange(len(files(newest)))
    path = files(newest)[number]
    same = older / path.relative_to(newest)
    shutil.copyfile(same if same.exists() else files(older)[number % len(files(older))], path)
    return f"{path.relative_to(newest)} of the older checkpoint"


def older_tree(draw: random.Random, newest: Path, older: Path) -> str:
    tree = draw.choice(["model", "optimizer"])
    shutil.rmtree(newest / tree)
    shutil.copytree(older / tree, newest / tree)
    return f"{tree} of the older checkpoint"


def older_whole(_: random.Random, newest: Path, older: Path) -> str:
    shutil.rmtree(newest)
    shutil.copytree(older, newest)
    return "the older checkpoint under the newer one's name"


KINDS: tuple[Damage, ...] = (flip, zero, truncate, delete, swap, older_file, older_tree, older_whole)


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files(folder)
    }


def trial(healthy: Path, run: Path, kind: Damage, draw: random.Random) -> bool:
    """Damages the newest of a copy and opens it in both ways; whether the damage mattered."""
    shutil.copytree(healthy, run)
    newest, older = (run / "checkpoints" / str(step) for step in (NEWEST, OLDER))
    done = kind(draw, newest, older)
    damaged = digest(run)

    said: list[str] = []
    variables, step = open_model(run / "checkpoints", abstract(), "last", said.append)
    equal(variables, model_of(step))
    check(done, step, said)
    assert digest(run) == damaged, "it is only read"

    said.clear()
    checkpoints = Checkpoints(run / "checkpoints", keep_last=3, say=said.append)
    resumed = checkpoints.resume(state_of(0))
    assert resumed is not None
    state, progress = resumed
    equal(state, state_of(progress["step"]))
    check(done, progress["step"], said)
    assert checkpoints.latest() == progress["step"]
    checkpoints.close()
    mattered = bool(said)
    if mattered:
        here, there = f"checkpoints/{NEWEST}/", f"damaged/{NEWEST}/"
        moved = {name.replace(here, there): content for name, content in damaged.items()}
        assert digest(run) == moved, "moved aside whole, and nothing else touched"
    else:
        assert digest(run) == damaged
    return mattered


def model_of(step: int) -> dict[str, Any]:
    state = state_of(step)
    return {"params": state.params, "tables": state.tables}


def check(done: str, step: int, said: list[str]) -> None:
    """Either the newest without a word, or the older one with a line that names the fault."""
    if step == NEWEST:
        assert said == [], done
        return
    assert step == OLDER, done
    (line,) = said
    assert "\n" not in line
    for told in (f"checkpoints/{NEWEST}: is damaged", f"step {OLDER}"):
        assert told in line, (done, line)
    assert any(
        name in line for name in ("model/", "optimizer/", "manifest.json", f"checkpoint of step {OLDER}")
    )


def trials(healthy: Path, folder: Path, patch: pytest.MonkeyPatch, count: int, seed: int) -> None:
    """Every other trial without the early look at small files: such are all of these, and none of a large model."""
    mattered = 0
    gc.freeze()  # each failed read has the garbage collected, and most of what there is is not of this test
    for number in range(count):
        patch.setattr(manifest, "SMALL", 0 if number % 2 else 1 << 20)
        kind = KINDS[(number // 2) % len(KINDS)]
        run = folder / "run"
        told = f"seed {seed}, trial {number}: {kind.__name__}"
        try:
            mattered += trial(healthy, run, kind, random.Random(f"{seed}:{number}"))
        except Exception as error:
            raise AssertionError(f"{told}: {error}") from error
        shutil.rmtree(run)
    gc.unfreeze()
    sys.stdout.write(f"seed {seed}: {count} trials, {mattered} fell back, the others were harmless\n")
    assert mattered >= count // 2


def test_damage_is_never_restored(healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trials(healthy, tmp_path, monkeypatch, count=20, seed=0)


@pytest.mark.slow
def test_damage_is_never_restored_in_many_trials(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trials(healthy, tmp_path, monkeypatch, count=1_000, seed=1)


def test_a_leaf_that_changed_is_named_with_its_file(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As with files too large to be looked at first: Orbax reads without a word, and the digest tells."""
    monkeypatch.setattr(manifest, "SMALL", 0)
    shutil.copytree(healthy, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / str(NEWEST)
    largest = max(files(newest / "model"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    said: list[str] = []
    assert open_model(newest.parent, abstract(), "last", said.append)[1] == OLDER
    name = largest.relative_to(newest)
    assert f"(model/tables/item_id is not what was saved; {name} is not what was written)" in said[0]
