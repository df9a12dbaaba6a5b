"""TensorBoard, W&B and MLflow get the numbers of `metrics.jsonl`, and none of them can end a run."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from dynrec_jax.config import default_config
from dynrec_jax.errors import ConfigError
from dynrec_jax.train import trackers
from dynrec_jax.train.metrics_writer import MetricsWriter
from dynrec_jax.train.trackers import Trackers


def config(**logging: Any) -> Any:
    c = default_config()
    c.logging.update(logging)
    return c


def write(folder: Path, c: Any, start: int, steps: range, said: list[str] | None = None) -> None:
    writer = MetricsWriter(
        folder, start, Trackers(c, folder, start, [].append if said is None else said.append)
    )
    for step in steps:
        writer.write(step, {"loss": 2.0 / step, "validation/ndcg@10": step / 8, "odd": float("nan")})
    writer.close()


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    write(tmp_path, config(tensorboard=True), 0, range(1, 2))
    (events,) = (tmp_path / "tensorboard").iterdir()
    raw = events.read_bytes()
    assert b"loss" in raw
    assert b"odd" not in raw, "what is no number is left out"


@pytest.mark.parametrize("key", ["tensorboard", "wandb", "mlflow"])
def test_what_is_not_installed_is_named(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    asked = config(**{key: True if key == "tensorboard" else "mine"})
    with pytest.raises(ConfigError, match=rf"config.logging.{key}: .* pip install 'dynrec-jax\[{key}\]'"):
        Trackers(asked, tmp_path, 0, [].append)


def test_one_that_fails_is_told_of_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __init__(self, *_: Any) -> None: ...

        def write(self, step: int, values: dict[str, float]) -> None:
            raise ConnectionError("no route to host")

        def close(self) -> None:
            raise ConnectionError("no route to host")

    monkeypatch.setitem(trackers.KINDS, "tensorboard", Broken)
    monkeypatch.setattr(trackers, "check_installed", lambda config: None)
    said: list[str] = []
    write(tmp_path, config(tensorboard=True), 0, range(1, 4), said)
    assert len(said) == 1
    assert "no route to host" in said[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own use of SQLAlchemy
def test_mlflow_gets_one_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    folder = tmp_path / "0003"
    folder.mkdir()
    asked = config(mlflow="films", group="first sweep")
    said: list[str] = []
    write(folder, asked, 0, range(1, 5), said)
    write(folder, asked, 3, range(4, 7), said)
    assert said == []
    client = MlflowClient(address)
    (run,) = client.search_runs([client.get_experiment_by_name("films").experiment_id])
    assert run.info.run_name == "0003"
    assert run.info.status == "FINISHED"
    assert run.data.tags["group"] == "first sweep"
    assert run.data.params["model.dim"] == str(asked.model.dim)
    history = {
        each.step: each.value for each in client.get_metric_history(run.info.run_id, "validation/ndcg_at_10")
    }
    assert history == {step: step / 8 for step in range(1, 7)}
    assert "odd" not in run.data.metrics


@pytest.mark.slow
def test_wandb_gets_one_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    said: list[str] = []
    asked = config(wandb="films", group="first sweep")
    write(tmp_path, asked, 0, range(1, 5), said)
    first = json.loads((tmp_path / trackers.RECORD).read_text())["wandb"]
    write(tmp_path, asked, 3, range(4, 7), said)
    assert said == []
    folders = [path for path in (tmp_path / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert folders
    assert {path.name.rpartition("-")[2] for path in folders} == {first}
    raw = b"".join(file.read_bytes() for path in folders for file in path.glob("*.wandb"))
    for text in (b"films", b"first sweep", b"validation/ndcg@10"):
        assert text in raw
    assert b"odd" not in raw
