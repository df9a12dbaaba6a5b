"""Files that are whole or not there."""

import os
from pathlib import Path

import pytest

from dynrec_jax import files


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.json"
    files.write_whole(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_whole(path, "new and longer")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.json", b"old")]


def test_a_device_or_a_folder_is_not_replaced_by_a_file(tmp_path: Path):
    os.mkfifo(tmp_path / "device")
    for path in (tmp_path / "device", tmp_path):
        with pytest.raises(FileExistsError, match="what is there is no file"):
            files.write_whole(path, "new")
    assert (tmp_path / "device").is_fifo()
    assert list(tmp_path.iterdir()) == [tmp_path / "device"]
