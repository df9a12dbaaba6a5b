"""Lines of metrics: whole, and rewound where a run goes on."""

import contextlib
import json
from pathlib import Path
from typing import Any

from dynrec_jax.train.metrics_writer import MetricsWriter


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path: Path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(3, {"loss": 1.5, "rate": 0.25})
    assert lines(tmp_path) == [{"step": 3, "loss": 1.5, "rate": 0.25}]
    writer.write(4, {"loss": 1.25})
    assert lines(tmp_path)[1:] == [{"step": 4, "loss": 1.25}]
    writer.close()


def test_what_lies_behind_the_checkpoint_is_dropped(tmp_path: Path):
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 8):
        writer.write(step, {"loss": float(step)})
    writer.close()
    MetricsWriter(tmp_path, 5).close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    writer = MetricsWriter(tmp_path, 2)
    writer.write(3, {"loss": 0.5})
    writer.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]


def test_the_last_value_is_that_of_the_lines_that_stay(tmp_path: Path):
    with contextlib.closing(MetricsWriter(tmp_path, 0)) as writer:
        assert writer.last("spent") == 0.0
        for step in range(1, 5):
            writer.write(step, {"spent": 10.0 * step} if step < 4 else {"loss": 1.0})
    with contextlib.closing(MetricsWriter(tmp_path, 2)) as writer:
        assert writer.last("spent") == 20.0
        assert writer.last("loss") == 0.0
