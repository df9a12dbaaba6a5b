"""Compiled programs on the disk: the same numbers with and without them, and nothing on the disk ends a run."""

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dynrec_jax import compiled
from dynrec_jax.compiled import SUFFIX, Store, keep_compiled
from dynrec_jax.files import temporary_name
from dynrec_jax.parallel.processes import ALONE
from dynrec_jax.verbs import caches

from . import tiny
from .commands import leftover

PROGRAM = bytes(range(256)) * 20


@pytest.fixture
def jax_may_keep() -> Iterator[None]:
    """JAX's cache as a user has it; `conftest` turns it off."""
    worth = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", worth)
    compilation_cache.reset_cache()


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


def program() -> bytes:
    """Compiles, or takes from the disk, and runs: what came out, bit by bit."""
    x = np.linspace(-3, 3, 37 * 37, dtype=np.float32).reshape(37, 37)
    return np.asarray(jax.jit(lambda x: jax.nn.softmax(x @ x, axis=-1).sum(axis=0))(x)).tobytes()


def test_a_program_from_the_disk_gives_the_bits_of_one_compiled_anew(
    tmp_path: Path, jax_may_keep: None, monkeypatch: pytest.MonkeyPatch
):
    """Whole runs are compared in invariants/test_crash.py."""
    anew = program()
    asked: list[bool] = []
    get = Store.get

    def counted(store: Store, key: str) -> bytes | None:
        found = get(store, key)
        asked.append(found is not None)
        return found

    monkeypatch.setattr(Store, "get", counted)
    monkeypatch.setattr(compiled, "WORTH", 0.0)
    keep_compiled(tmp_path)
    assert program() == anew
    assert asked
    assert not any(asked)
    kept = [path.name for path in entries(tmp_path)]
    assert len(kept) == len(asked)

    asked.clear()
    assert program() == anew
    assert asked == [True] * len(kept)

    for path in entries(tmp_path):  # as a power failure leaves a file of which a part was on the disk
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    asked.clear()
    assert program() == anew, "and without a warning, which would be an error here"
    assert asked == [False] * len(kept)

    asked.clear()
    assert program() == anew
    assert asked == [True] * len(kept), "good ones have taken their places"


def zeros(content: bytes) -> bytes:
    return content[:1000] + bytes(500) + content[1500:]


def flipped(content: bytes) -> bytes:
    return content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]


@pytest.mark.parametrize(
    "damage",
    [lambda c: b"", lambda c: c[:20], lambda c: c[:-1], lambda c: c + b"x", zeros, flipped],
    ids=["empty", "less than the proof", "torn", "longer", "zeros", "a bit"],
)
def test_a_damaged_program_is_none_until_it_is_kept_again(tmp_path: Path, damage):
    store = Store(tmp_path)
    store.put("key", PROGRAM)
    assert store.get("key") == PROGRAM
    assert store.get("other") is None
    (path,) = entries(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert store.get("key") is None
    store.put("key", PROGRAM)
    assert Store(tmp_path).get("key") == PROGRAM


def test_a_program_under_the_name_of_another_is_none(tmp_path: Path):
    store = Store(tmp_path)
    store.put("one", PROGRAM)
    store.put("other", PROGRAM[::-1])
    one, other = entries(tmp_path)
    one.write_bytes(other.read_bytes())
    assert sorted([store.get("one") is None, store.get("other") is None]) == [False, True]


def test_a_program_is_cut_for_a_number_of_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(tmp_path)
    store.put("key", PROGRAM)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(1000)))
    assert store.get("key") is None


def test_the_least_recently_used_make_room_and_nothing_else_does(tmp_path: Path):
    other = tmp_path / "thesis.txt"
    other.write_bytes(bytes(50_000))
    size = len(PROGRAM) + 32
    store = Store(tmp_path, bound=3 * size)
    for second, key in enumerate("abc"):
        before = set(entries(tmp_path))
        store.put(key, PROGRAM)
        (path,) = set(entries(tmp_path)) - before
        os.utime(path, (second, second))
    leftover(path).write_bytes(bytes(size))
    os.utime(leftover(path), (0.5, 0.5))
    assert store.get("a") == PROGRAM
    store.put("d", PROGRAM)
    assert [key for key in "abcd" if store.get(key)] == ["a", "c", "d"]
    assert not leftover(path).exists()
    assert other.stat().st_size == 50_000
    store.put("large", bytes(4 * size))
    assert [key for key in "abcd" if store.get(key)] == ["a", "c", "d"], (
        "what fits nowhere drives nothing out"
    )


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path):
    mine, dead = temporary_name(tmp_path / f"a{SUFFIX}"), leftover(tmp_path / f"b{SUFFIX}")
    mine.touch()
    dead.touch()
    assert Store.opened(tmp_path) is not None
    assert mine.exists()
    assert not dead.exists()


def test_a_full_disk_is_said_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compiled, "write_whole", full)
    store = Store(tmp_path)
    store.put("key", PROGRAM)
    store.put("other", PROGRAM)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: compiled programs are not kept there: No space left on device"
    ]
    assert store.get("key") is None


def test_a_folder_that_cannot_be_made_or_that_others_write_to_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").touch()
    assert Store.opened(tmp_path / "file" / "compiled") is None
    for number, mode in enumerate((0o777, 0o770)):
        others = tmp_path / str(number)
        others.mkdir()
        others.chmod(mode)
        assert Store.opened(others) is None
    own = tmp_path / "own"
    own.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled.os, "getuid", lambda: own.stat().st_uid + 1)
        assert Store.opened(own) is None
    assert Store.opened(own) is not None
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 4
    made = tmp_path / "new" / "compiled"
    assert Store.opened(made) is not None
    assert made.stat().st_mode & 0o077 == 0, "of the user alone"


def test_where_programs_are_kept_follows_config_flag_and_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    used: list[Path] = []
    monkeypatch.setattr(compiled, "keep_compiled", used.append)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches.keep_programs(tiny.config(), None, ALONE)
    caches.keep_programs(tiny.config(data__cache_dir="/data"), None, ALONE)
    caches.keep_programs(tiny.config(data__cache_dir="/data"), "/flag", ALONE)
    caches.keep_programs(tiny.config(data__cache_dir="/data", compiled_dir="/programs"), None, ALONE)
    caches.keep_programs(tiny.config(data__cache_dir="/data", compiled_dir="/programs"), "/flag", ALONE)
    caches.keep_programs(tiny.config(compiled_dir="off"), None, ALONE)
    caches.keep_programs(tiny.config(), None, SimpleNamespace(count=2))
    caches.keep_programs(tiny.config(compiled_dir="off"), "/flag", ALONE)
    told = [
        tmp_path / "dynrec_jax/compiled",
        "/data/compiled",
        "/flag/compiled",
        "/programs",
        "/flag/compiled",
    ]
    assert used == [Path(path) for path in told]


def test_a_user_s_own_choice_of_jax_s_cache_stands(tmp_path: Path):
    """It is off in the tests; nothing is made."""
    keep_compiled(tmp_path / "compiled")
    assert not (tmp_path / "compiled").exists()
    assert jnp.ones(()).item() == 1
