"""What lies in an object store is copied once, and read as if it was here."""

from pathlib import Path

import fsspec
import pandas as pd
import pytest

from dynrec_jax import workdir as workdirs
from dynrec_jax.data.remote import fetched
from dynrec_jax.errors import DataError

from ..commands import digest, dynrec, one_line, small_run


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> fsspec.AbstractFileSystem:
    """An object store that this process alone sees, and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def test_a_run_in_a_store_is_scored_like_one_that_is_here(
    store: fsspec.AbstractFileSystem, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
):
    made = small_run(tmp_path_factory)
    store.put(str(made.workdir), "/bucket/runs/shop", recursive=True)
    store.put(str(made.dataset), "/bucket/data", recursive=True)
    items = workdirs.open(made.workdir).item_ids.to_pylist()
    store.pipe("/bucket/deny.txt", f"{items[0]}\n".encode())
    (tmp_path / "deny.txt").write_text(f"{items[0]}\n")
    found = {}
    for name, flags in {
        "here": {"workdir": made.workdir, "deny": tmp_path / "deny.txt"},
        "there": {
            "workdir": "memory://bucket/runs/shop",
            "dataset": "memory://bucket/data",
            "deny": "memory://bucket/deny.txt",
        },
    }.items():
        assert dynrec("score", out=tmp_path / name, k=5, **flags) == 0
        found[name] = pd.read_parquet(tmp_path / name)
    pd.testing.assert_frame_equal(found["there"], found["here"])
    opened = workdirs.open("memory://bucket/runs/shop", dataset="memory://bucket/data")
    assert opened.step == workdirs.open(made.workdir).step


def test_what_has_not_changed_is_not_fetched_again(store: fsspec.AbstractFileSystem, monkeypatch):
    for name, text in (("a", "one"), ("b/c", "two"), ("damaged/d", "bad")):
        store.pipe(f"/bucket/run/{name}", text.encode())
    here = fetched("memory://bucket/run")
    assert sorted(name for name, value in digest(here).items() if value != "/") == ["a", "b/c"]
    taken: list[str] = []
    get = type(store).get_file

    def counted(self: object, source: str, target: str, **more: object) -> None:
        taken.append(source)
        get(self, source, target, **more)

    monkeypatch.setattr(type(store), "get_file", counted)
    assert fetched("memory://bucket/run") == here
    assert taken == []
    store.pipe("/bucket/run/a", b"ONE")
    store.rm("/bucket/run/b/c")
    (here / "unrelated").write_text("ours")
    fetched("memory://bucket/run")
    assert taken == ["/bucket/run/a"]
    assert (here / "a").read_text() == "ONE"
    assert not (here / "b" / "c").exists()


def test_what_is_not_there_or_not_known(store: fsspec.AbstractFileSystem, tmp_path: Path, capsys):
    store.pipe("/bucket/x", b"1")
    assert fetched(str(tmp_path)) == tmp_path
    with pytest.raises(DataError, match="nothing is there"):
        fetched("memory://bucket/nothing")
    for address in ("reference://x", "zip://a::memory://bucket/x", "file:///etc/passwd"):
        with pytest.raises(DataError, match="no store"):
            fetched(address)
    assert dynrec("score", workdir="gs://bucket/run", out=tmp_path / "out") == 1
    assert "gcsfs" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_outside_of_the_copy(
    store: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch
):
    infos = {"/bucket/run/../../evil": {"name": "/bucket/x", "size": 1, "type": "file"}}
    store.pipe("/bucket/x", b"1")
    monkeypatch.setattr(type(store), "find", lambda *_, **__: infos)
    with pytest.raises(DataError, match="outside"):
        fetched("memory://bucket/run")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name == "evil"]
