import csv
import runpy
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dynrec_jax.config import default_config, flat
from dynrec_jax.sweep import choice, over, product, real, search, when
from dynrec_jax.sweep.best import experiment_file
from dynrec_jax.sweep.charts import draw, importance
from dynrec_jax.sweep.definition import Sweep, make
from dynrec_jax.sweep.ledger import COMPLETE, FAILED, PRUNED, RUNNING, Row
from dynrec_jax.sweep.table import best, groups, records, rich_table, seed_records, summary, write


def rows_of(sweep: Sweep, values: list[float | None], states: list[str] | None = None) -> list[Row]:
    points = sweep.what.points
    states = states or [COMPLETE] * len(values)
    return [
        Row(
            number,
            state,
            point,
            value,
            10,
            {} if value is None else {"ndcg@10": value, "mrr": 2 * value},
            1.5,
            1,
        )
        for number, (point, value, state) in enumerate(zip(points, values, states, strict=True))
    ]


@pytest.fixture
def seeds() -> tuple[Sweep, list[Row]]:
    sweep = make(default_config(), product(over("model.dim", [32, 64, 128]), over("seed", range(2))))
    return sweep, rows_of(sweep, [0.10, 0.20, 0.16, 0.17, 0.30, None], [COMPLETE] * 5 + [FAILED])


def test_seeds_are_taken_together(seeds: tuple[Sweep, list[Row]]) -> None:
    found = groups(seeds[1])
    assert [group.point["model.dim"] for group in found] == [64, 32, 128]  # the last has lost a seed
    assert found[0].mean == pytest.approx(0.165)
    assert found[0].deviation == pytest.approx(0.005 * 2**0.5)
    assert found[2].deviation == 0.0
    assert seed_records(*seeds)[1] == {
        "model.dim": 32,
        "mean": pytest.approx(0.15),
        "deviation": pytest.approx(0.05 * 2**0.5),
        "seeds": 2,
        "trials": "0 1",
    }


def test_the_best_is_of_the_best_mean_and_not_the_luckiest(seeds: tuple[Sweep, list[Row]]) -> None:
    row = best(seeds[1])
    assert row is not None
    assert row.number == 3


def test_the_best_config_comes_back_as_an_experiment_file(
    seeds: tuple[Sweep, list[Row]], tmp_path: Path
) -> None:
    base = default_config()
    base.model.time = ("bias",)
    base.dataset = 'it\'s "here"\\\n'
    sweep = make(base, seeds[0].what.points)
    text = experiment_file(sweep, seeds[1])
    assert text is not None
    assert "0.1650 ± 0.0071" in text
    (tmp_path / "best.py").write_text(text)
    made = runpy.run_path(str(tmp_path / "best.py"))["get_config"]()
    assert flat(made) == flat(sweep.config_of({"model.dim": 64, "seed": 1}))
    assert experiment_file(sweep, []) is None


def test_records_have_a_row_a_trial(seeds: tuple[Sweep, list[Row]]) -> None:
    found = records(*seeds)
    assert [record["trial"] for record in found] == list(range(6))
    assert list(found[0])[:6] == ["trial", "state", "model.dim", "seed", "ndcg@10", "mrr"]
    assert found[5]["ndcg@10"] is None


def test_tables_on_the_disk_say_the_same(tmp_path: Path) -> None:
    sweep = make(
        default_config(),
        [{"model.time": ("bias",)}, {"train.learning_rate": 0.5}, {"loss.event_weights": ["a,b:2", 'c":3']}],
    )
    rows = rows_of(sweep, [0.25, None, 0.5], [COMPLETE, FAILED, PRUNED])
    rows[1] = rows[1]._replace(reason='a "reason",\nof two lines')
    write(sweep, rows, tmp_path)
    with (tmp_path / "sweep.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["state"] for row in read] == ["complete", "failed", "pruned"]
    assert read[1]["reason"] == 'a "reason",\nof two lines'
    assert read[0]["train.learning_rate"] == ""
    table = pq.read_table(tmp_path / "sweep.parquet").to_pylist()
    assert [row["ndcg@10"] for row in table] == [0.25, None, 0.5]
    assert table[0]["model.time"] == ["bias"]
    assert not (tmp_path / "seeds.csv").exists()


def test_the_terminal_shows_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    sweep = make(default_config(), [{"item.bert": "[red]x[/red]"}, {"item.bert": "[/]"}])
    Console(width=200).print(rich_table(sweep, rows_of(sweep, [0.5, 0.25])))
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out
    assert "[/]" in out


def test_a_summary_tells_what_is_left(seeds: tuple[Sweep, list[Row]]) -> None:
    rows = [*seeds[1][:4], Row(4, RUNNING, {}), seeds[1][5]]
    assert summary(seeds[0], rows) == (
        "6 trials: 4 complete, 1 failed, 1 running; best ndcg@10 0.1650 ± 0.0071 over 2 seeds"
    )


def test_what_matters_is_told_apart_from_what_does_not() -> None:
    points = product(over("train.learning_rate", [1e-4, 1e-3, 1e-2]), over("model.layers", [1, 2, 3]))
    sweep = make(default_config(), points)
    rows = rows_of(
        sweep, [point["train.learning_rate"] + 1e-6 * point["model.layers"] for point in sweep.what.points]
    )
    shares = importance(sweep, rows)
    assert list(shares) == ["train.learning_rate", "model.layers"]
    assert shares["train.learning_rate"] > 0.8
    assert importance(sweep, rows[:2]) == {}


def test_charts_are_pictures_also_of_conditions(tmp_path: Path) -> None:
    space = {
        "train.learning_rate": real(1e-4, 1e-2, log=True),
        "model.block": choice("prenorm", "hstu"),
        "model.time_buckets": when("model.block", "hstu", choice(8, 16)),
    }
    sweep = make(default_config(), search(space, trials=5))
    rows = [
        Row(0, COMPLETE, {"train.learning_rate": 1e-3, "model.block": "prenorm"}, 0.1, 5, {"ndcg@10": 0.1}),
        Row(1, COMPLETE, {"train.learning_rate": 2e-3, "model.block": "prenorm"}, 0.3, 5, {"ndcg@10": 0.3}),
        Row(2, PRUNED, {"train.learning_rate": 2e-3, "model.block": "hstu", "model.time_buckets": 8}, 0.2, 5),
        Row(
            3,
            COMPLETE,
            {"train.learning_rate": 4e-3, "model.block": "hstu", "model.time_buckets": 16},
            0.2,
            5,
        ),
        Row(
            4, COMPLETE, {"train.learning_rate": 5e-3, "model.block": "hstu", "model.time_buckets": 8}, 0.4, 5
        ),
        Row(5, FAILED, {"train.learning_rate": 5e-3, "model.block": "prenorm"}, reason="NaN"),
    ]
    made = draw(sweep, rows, importance(sweep, rows), tmp_path)
    assert {path.name for path in made} == {"history.png", "parallel_coordinates.png", "importance.png"}
    for path in made:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert draw(sweep, [], {}, tmp_path) == []
