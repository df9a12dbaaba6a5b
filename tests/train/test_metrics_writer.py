"""Lines of metrics: whole, rewound where a run goes on, and TensorBoard on demand."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from dynrec_jax.errors import ConfigError
from dynrec_jax.train.metrics_writer import MetricsWriter


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path: Path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    writer.write(3, {"loss": 1.5, "rate": 0.25})
    assert lines(tmp_path) == [{"step": 3, "loss": 1.5, "rate": 0.25}]
    writer.write(4, {"loss": 1.25})
    assert lines(tmp_path)[1:] == [{"step": 4, "loss": 1.25}]
    writer.close()


def test_what_lies_behind_the_checkpoint_is_dropped(tmp_path: Path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    for step in range(1, 8):
        writer.write(step, {"loss": float(step)})
    writer.close()
    MetricsWriter(tmp_path, 5, tensorboard=False).close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    writer = MetricsWriter(tmp_path, 2, tensorboard=False)
    writer.write(3, {"loss": 0.5})
    writer.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path):
    pytest.importorskip("tensorboardX")
    writer = MetricsWriter(tmp_path, 0, tensorboard=True)
    writer.write(1, {"loss": 2.0, "odd": float("nan")})
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    raw = events.read_bytes()
    assert b"loss" in raw
    assert b"odd" not in raw, "what is no number is left out"


def test_tensorboard_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = builtins.__import__

    def absent(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "tensorboardX":
            raise ImportError(name)
        return found(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"pip install 'dynrec-jax\[tensorboard\]'"):
        MetricsWriter(tmp_path, 0, tensorboard=True)
