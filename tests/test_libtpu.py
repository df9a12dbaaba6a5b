"""libtpu keeps quiet where there is no TPU, and finds what it needs where there is one."""

import os
from pathlib import Path

import pytest

from dynrec_jax import libtpu


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in libtpu.QUIET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(libtpu, "installed", lambda: True)


def settings() -> dict[str, str]:
    return {name: os.environ[name] for name in libtpu.QUIET if name in os.environ}


def test_it_is_told_that_there_is_no_tpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TPU_LOG_DIR", "mine")
    libtpu.hush_without_chips(tmp_path)
    assert settings() == {**libtpu.QUIET, "TPU_LOG_DIR": "mine"}


@pytest.mark.parametrize("chip", ["accel0", "vfio/0"])
def test_where_there_is_a_chip_nothing_is_said(tmp_path: Path, chip: str):
    (tmp_path / chip).parent.mkdir(exist_ok=True)
    (tmp_path / chip).touch()
    libtpu.hush_without_chips(tmp_path)
    assert settings() == {}


def test_what_is_not_installed_needs_no_hushing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(libtpu, "installed", lambda: False)
    libtpu.hush_without_chips(tmp_path)
    assert settings() == {}


def test_it_is_quiet_for_a_while(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "0")
    with libtpu.quiet():
        assert settings() == {**libtpu.QUIET, "TPU_SKIP_MDS_QUERY": "0"}
    assert settings() == {"TPU_SKIP_MDS_QUERY": "0"}
