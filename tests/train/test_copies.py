"""The copy of a run in an object store: whole checkpoints alone, up to date at the end, and enough to go on with."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from dynrec_jax.errors import ConfigError, MachineError, Preempted
from dynrec_jax.parallel.pulse import Pulse
from dynrec_jax.train import attempts
from dynrec_jax.train.copies import Copies, begin_from, kept

from ..commands import dynrec, experiment, make, one_line

ADDRESS = "memory://bucket/runs/shop"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[fsspec.AbstractFileSystem]:
    """An object store that this process alone sees, and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run folder looks like, with a checkpoint, one that is still written, and one that was damaged."""
    folder = tmp_path / "run"
    for name, text in {
        "config.json": "{}",
        "run.json": "{}",
        "metrics.jsonl": "one",
        ".lock": "",
        ".run.json.tmp-1-2": "half",
        "checkpoints/5/model/d/a": "weights",
        "checkpoints/5/manifest.json": "manifest",
        "checkpoints/6.orbax-checkpoint-tmp-0/model/d/a": "half",
        "damaged/4/manifest.json": "bad",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def there(store: fsspec.AbstractFileSystem) -> dict[str, str]:
    root = "/bucket/runs/shop/"
    return {name.removeprefix(root): store.cat(name).decode(errors="replace") for name in store.find(root)}


def wait_for(store: fsspec.AbstractFileSystem, name: str, text: str) -> None:
    deadline = time.monotonic() + 20
    while there(store).get(name) != text:
        assert time.monotonic() < deadline
        time.sleep(0.01)


WHOLE = {
    "config.json": "{}",
    "run.json": "{}",
    "metrics.jsonl": "one",
    "checkpoints/5/model/d/a": "weights",
    "checkpoints/5/manifest.json": "manifest",
}


@pytest.mark.parametrize("end", [None, Preempted])
def test_what_belongs_to_a_run_is_copied_and_what_is_gone_goes(
    store: fsspec.AbstractFileSystem, run: Path, end: type[Exception] | None
):
    with contextlib.suppress(Preempted), kept(run, ADDRESS, Pulse()) as update:
        update()
        wait_for(store, "checkpoints/5/manifest.json", "manifest")
        (run / "metrics.jsonl").write_text("one\ntwo")
        shutil.copytree(run / "checkpoints" / "5", run / "checkpoints" / "10")
        shutil.rmtree(run / "checkpoints" / "5")
        if end is not None:
            raise end
    found = there(store)
    assert found["metrics.jsonl"] == "one\ntwo"
    assert {name for name in found if "checkpoints" in name} == {
        "checkpoints/10/model/d/a",
        "checkpoints/10/manifest.json",
    }


def test_a_manifest_goes_last_and_what_has_not_changed_stays(
    store: fsspec.AbstractFileSystem, run: Path, monkeypatch: pytest.MonkeyPatch
):
    put, order = type(store).put_file, []

    def noted(self: object, source: str, target: str, **more: object) -> None:
        order.append(target.removeprefix("/bucket/runs/shop/"))
        put(self, source, target, **more)

    monkeypatch.setattr(type(store), "put_file", noted)
    with kept(run, ADDRESS, Pulse()):
        pass
    assert order[-1] == "checkpoints/5/manifest.json"
    assert order.index("run.json") < order.index("config.json") < order.index("checkpoints/5/model/d/a")
    order.clear()
    with kept(run, ADDRESS, Pulse()):
        pass
    assert "checkpoints/5/model/d/a" not in order


def test_a_store_that_fails_for_a_while_is_no_reason_to_end(
    store: fsspec.AbstractFileSystem, run: Path, monkeypatch: pytest.MonkeyPatch
):
    put, down = type(store).put_file, [True]

    def failing(self: object, *arguments: str, **more: object) -> None:
        if down:
            raise TimeoutError("the store does not answer")
        put(self, *arguments, **more)

    monkeypatch.setattr(type(store), "put_file", failing)
    said: list[str] = []
    one = Copies(run, ADDRESS, said.append)
    one.update()
    with pytest.raises(MachineError, match="is not up to date; what is here is whole"):
        one.close(Pulse())
    assert "config.json" not in there(store)
    down.clear()
    assert all(
        "cannot be written (TimeoutError: the store does not answer); tried again" in line for line in said
    )
    Copies(run, ADDRESS, said.append).close(Pulse())
    assert there(store) == WHOLE


def test_a_machine_without_the_run_goes_on_with_the_copy(
    store: fsspec.AbstractFileSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    made = make(tmp_path, train__steps=3)
    shutil.rmtree(made.workdir)
    longer = {"train__steps": 6, "train__checkpoint_every": 3, "train__evaluate_every": 6}
    config = experiment(tmp_path / "longer.py", made.dataset, **longer)
    stopped = iter([False, False, True])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynrec_jax.parallel.watchdog.Watchdog.stop_here", lambda self: next(stopped, True))
        assert dynrec("train", config=config, workdir=made.workdir, copy_to=ADDRESS) == 75
    shutil.move(made.workdir, tmp_path / "lost")
    capsys.readouterr()
    assert dynrec("train", config=config, workdir=made.workdir, copy_to=ADDRESS) == 0
    assert "going on from step 3" in capsys.readouterr().err
    assert not begin_from(ADDRESS, made.workdir)
    assert {"checkpoints/6/manifest.json", "config.json", "attempts.jsonl"} <= there(store).keys()


def test_what_was_cut_short_there_is_made_anew_and_what_is_not_ours_stays(
    store: fsspec.AbstractFileSystem, run: Path
):
    root = "/bucket/runs/shop/checkpoints"
    store.pipe(f"{root}/5/model/d/a", b"WEIGHTS")  # as long as ours, of another start
    store.pipe(f"{root}/5/model/d/b", b"a file that ours has not")
    store.pipe(f"{root}/3/manifest.json", b"of an earlier start")
    with kept(run, ADDRESS, Pulse()):
        pass
    assert there(store) == {**WHOLE, "checkpoints/3/manifest.json": "of an earlier start"}
    # Set aside here since it was damaged here; there it may be whole.
    with kept(run, ADDRESS, Pulse()) as update:
        (run / "metrics.jsonl").write_text("one\ntwo")
        update()
        wait_for(store, "metrics.jsonl", "one\ntwo")
        shutil.move(run / "checkpoints" / "5", run / "damaged" / "5")
    assert "checkpoints/5/manifest.json" in there(store)


def test_the_copy_of_another_run_is_left_alone(store: fsspec.AbstractFileSystem, run: Path, tmp_path: Path):
    attempts.begin(run, 0, 1)
    with kept(run, ADDRESS, Pulse()):
        pass
    assert not begin_from(ADDRESS, run)
    before, other = there(store), tmp_path / "other"
    shutil.copytree(run, other)
    (other / "attempts.jsonl").unlink()
    attempts.begin(other, 0, 1)
    with pytest.raises(ConfigError, match="holds the copy of another run than"):
        begin_from(ADDRESS, other)
    said: list[str] = []
    with pytest.raises(MachineError, match="is not up to date"):
        Copies(other, ADDRESS, said.append).close(Pulse())
    assert "started again elsewhere" in said[0]
    assert there(store) == before


def test_a_copy_that_cannot_be_is_refused_before_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for address, told in {
        "somewhere": "expected the address of a folder",
        "ftp://a/b": "ftp is no store",
    }.items():
        assert dynrec("train", workdir=tmp_path / "run", config=tmp_path / "none.py", copy_to=address) == 2
        assert told in one_line(capsys)
