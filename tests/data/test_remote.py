"""What lies in an object store is copied once, and read as if it was here."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pandas as pd
import pytest

from dynrec_jax import cli
from dynrec_jax import workdir as workdirs
from dynrec_jax.data import remote
from dynrec_jax.data.dataset import open_dataset
from dynrec_jax.data.remote import fetched
from dynrec_jax.errors import DataError, MachineError

from ..commands import digest, dynrec, leftover, one_line, small_run


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> fsspec.AbstractFileSystem:
    """An object store that this process alone sees, and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def fill(store: fsspec.AbstractFileSystem, **files: str) -> None:
    """Puts files into the folder `run`."""
    for name, text in files.items():
        store.pipe(f"/bucket/run/{name}", text.encode())


def digest_of_text(folder: Path) -> dict[str, str]:
    """What is in the files of a folder."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def watched(
    store: fsspec.AbstractFileSystem, patch: pytest.MonkeyPatch, fails: str = "", seconds: float = 0.0
) -> list[str]:
    """The files that are fetched from here on, each in so many seconds; one of them fails."""
    taken: list[str] = []
    get = type(store).get_file

    def counted(self: object, source: str, target: str, **more: object) -> None:
        taken.append(source)
        time.sleep(seconds)
        if source == fails:
            raise OSError("gone")
        get(self, source, target, **more)

    patch.setattr(type(store), "get_file", counted)
    return taken


def test_a_run_in_a_store_is_scored_and_opened(
    store: fsspec.AbstractFileSystem, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
):
    made = small_run(tmp_path_factory)
    store.put(str(made.workdir), "/bucket/runs/shop", recursive=True)
    store.put(str(made.dataset), "/bucket/data", recursive=True)
    denied = open_dataset(made.dataset).item_ids().to_pylist()[:16]
    store.pipe("/bucket/deny.txt", "\n".join(denied).encode())
    addresses = {"workdir": "memory://bucket/runs/shop", "dataset": "memory://bucket/data"}
    out = tmp_path / "out"
    assert dynrec("score", out=out, k=5, deny="memory://bucket/deny.txt", **addresses) == 0
    scored = pd.read_parquet(out)
    assert len(scored) == 60
    assert not set(denied) & {item for items in scored["item_ids"] for item in items}
    for name, place in (("workdir", made.workdir), ("dataset", made.dataset)):
        # Byte for byte, so that all that comes of it is the same.
        assert digest_of_files(fetched(addresses[name])) == digest_of_files(place)
    opened = workdirs.open(addresses["workdir"], dataset=addresses["dataset"])
    assert opened.path == fetched(addresses["workdir"])


def digest_of_files(folder: Path) -> dict[str, str]:
    """Of all but empty folders and locks."""
    return {name: value for name, value in digest(folder).items() if value != "/" and name != ".lock"}


def test_what_has_not_changed_is_not_fetched_again(store: fsspec.AbstractFileSystem, monkeypatch):
    fill(store, a="one", **{"b/c": "two", "damaged/d": "bad", "undamaged/e": "good", ".lock": ""})
    fill(store, **{"7.orbax-checkpoint-tmp-3/x": "half", ".x.tmp-1": "half"})
    here = fetched("memory://bucket/run")
    assert [name for name, value in digest(here).items() if value != "/"] == ["a", "b/c", "undamaged/e"]
    taken = watched(store, monkeypatch)
    assert fetched("memory://bucket/run/") == here
    assert taken == []
    store.pipe("/bucket/run/a", b"ONE")
    store.rm("/bucket/run/b/c")
    (here / "unrelated").write_text("ours")
    fetched("memory://bucket/run")
    assert taken == ["/bucket/run/a"]
    assert (here / "a").read_text() == "ONE"
    assert not (here / "b").exists(), "an empty folder would look like a damaged checkpoint"


def test_a_store_that_says_nothing_of_changes_is_not_believed(
    store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
):
    """Weights of another training have the same size."""
    fill(store, a="one", b="two")
    known, asked = {"type": "file", "size": 3}, []
    infos = {"/bucket/run/a": {**known, "blob_id": "1"}, "/bucket/run/b": known}
    monkeypatch.setattr(type(store), "invalidate_cache", lambda self, path=None: asked.append("anew"))
    monkeypatch.setattr(type(store), "find", lambda *_, **__: asked.append("listed") or infos)
    here = fetched("memory://bucket/run")
    taken = watched(store, monkeypatch)
    fill(store, a="ONE", b="TWO")
    fetched("memory://bucket/run")
    assert taken == ["/bucket/run/b"]
    infos["/bucket/run/a"]["blob_id"] = "2"
    fetched("memory://bucket/run")
    assert ((here / "a").read_text(), (here / "b").read_text()) == ("ONE", "TWO")
    assert asked == ["anew", "listed"] * 3, "no listing of before"


def test_a_file_that_was_cut_off_is_none(store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch):
    fill(store, a="a whole file")
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "get_file", lambda self, source, target: Path(target).write_text("a wh"))
        with pytest.raises(MachineError, match=r"4 bytes of /bucket/run/a came, and 12 are listed"):
            fetched("memory://bucket/run")
    here = fetched("memory://bucket/run")
    assert (here / "a").read_text() == "a whole file"
    assert [path.name for path in here.iterdir()] == ["a"]


def test_a_copy_that_was_cut_short_goes_on(store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch):
    fill(store, a="one", b="two", c="six")
    here = fetched("memory://bucket/run")
    old = store.store["/bucket/run/a"]
    fill(store, a="ONE", b="TWO", c="SIX")
    with monkeypatch.context() as patch:
        taken = watched(store, patch, fails="/bucket/run/b")
        with pytest.raises(MachineError, match=r"/bucket/run/b cannot be copied \(OSError: gone\); the same"):
            fetched("memory://bucket/run")
        assert taken == ["/bucket/run/a", "/bucket/run/b"]
    (leftover(here / "b")).write_text("half")
    store.store["/bucket/run/a"] = old  # as it was before, its times too
    taken = watched(store, monkeypatch)
    fetched("memory://bucket/run")
    assert taken == ["/bucket/run/a", "/bucket/run/b", "/bucket/run/c"]
    assert digest_of_text(here) == {"a": "one", "b": "TWO", "c": "SIX"}


def test_what_has_come_is_noted_for_who_is_killed(
    store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
):
    fill(store, a="one", b="two")
    monkeypatch.setattr(remote, "EVERY", 0)
    whole, kept = remote.write_whole, []

    def kept_until_killed(path: Path, content: str) -> None:
        kept.append(json.loads(content))
        if len(kept) < 3:  # what comes later does not come
            whole(path, content)

    monkeypatch.setattr(remote, "write_whole", kept_until_killed)
    fetched("memory://bucket/run")
    assert [sorted(each) for each in kept] == [[], ["a"], ["a", "b"], ["a", "b"]]
    taken = watched(store, monkeypatch)
    fetched("memory://bucket/run")
    assert taken == ["/bucket/run/b"]


def test_two_at_a_time_fetch_it_once(store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch):
    fill(store, a="one", b="two")
    taken = watched(store, monkeypatch, seconds=0.1)
    with ThreadPoolExecutor() as threads:
        one, other = threads.map(fetched, ["memory://bucket/run"] * 2)
    assert one == other
    assert taken == ["/bucket/run/a", "/bucket/run/b"]


def test_what_consoles_leave_for_a_folder_is_no_file(
    store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
):
    fill(store, a="one")
    infos = store.find("/bucket/run", detail=True)
    more = {"/bucket/run/": {"size": 0, "type": "file"}, "/bucket/run/b": {"size": 0, "type": "directory"}}
    monkeypatch.setattr(type(store), "find", lambda *_, **__: {**more, **infos})
    assert digest_of_text(fetched("memory://bucket/run")) == {"a": "one"}


def test_a_file_in_place_of_a_folder_and_the_other_way_round(store: fsspec.AbstractFileSystem):
    fill(store, a="one", **{"b/c": "two"})
    here = fetched("memory://bucket/run")
    store.rm("/bucket/run/a")
    store.rm("/bucket/run/b", recursive=True)
    fill(store, b="one", **{"a/c": "two"})
    assert fetched("memory://bucket/run") == here
    assert digest_of_text(here) == {"b": "one", "a/c": "two"}


def test_nothing_secret_is_told(store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch):
    def failing(*_: object, **__: object) -> None:
        raise ValueError("GET https://me:hunter2@host/run?X-Signature=abc&y failed")

    with pytest.raises(DataError, match=r"memory://…@bucket/x\?…: nothing is there"):
        fetched("memory://me:hunter2@bucket/x?sig=abc")
    fill(store, a="one")
    monkeypatch.setattr(type(store), "get_file", failing)
    with pytest.raises(MachineError, match=r"GET https://…@host/run\?… failed"):
        fetched("memory://bucket/run")


def test_runs_between_plus_and_comma_are_each_fetched(store: fsspec.AbstractFileSystem):
    fill(store, a="one", b="two")
    found = cli._here("memory://bucket/run/a+memory://bucket/run/b,here+there")
    one, other = (fetched(f"memory://bucket/run/{name}") for name in "ab")
    assert found == f"{one}+{other},here+there"
    assert cli._here("memory://bucket/run/a") == str(one)


def test_what_is_not_there_or_not_known(store: fsspec.AbstractFileSystem, tmp_path: Path, capsys):
    store.pipe("/bucket/x", b"1")
    assert fetched(str(tmp_path)) == tmp_path
    with pytest.raises(DataError, match="nothing is there"):
        fetched("memory://bucket/nothing")
    for address in ("reference://x", "zip://a::memory://bucket/x", "file:///etc/passwd"):
        with pytest.raises(DataError, match="no store"):
            fetched(address)
    for address in ("memory://bucket/..", "memory://x::file:///etc/passwd"):
        with pytest.raises(DataError, match="without :: and"):
            fetched(address)
    assert dynrec("score", workdir="gs://bucket/run", out=tmp_path / "out") == 1
    assert "gcsfs" in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["run/../../evil", "run//evil", "run/./evil", "run2/evil", "run"])
def test_nothing_is_written_outside_of_the_copy(
    store: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch, name: str
):
    address = "memory://bucket/run/" if name != "run" else "memory://bucket/run/a"
    infos = {f"/bucket/{name}": {"name": "/bucket/x", "size": 1, "type": "file"}}
    store.pipe("/bucket/x", b"1")
    monkeypatch.setattr(type(store), "find", lambda *_, **__: infos)
    with pytest.raises(DataError, match="which is no file below it"):
        fetched(address)
    kept = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert kept == {".lock"}
