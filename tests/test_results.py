"""README's tables are those that the result files make, and each file's command trains what it says."""

import functools
import importlib.util
import json
import runpy
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from absl import flags

from dynrec_jax import config as configs
from dynrec_jax.errors import ConfigError
from dynrec_jax.verbs.experiment import define_config, load, read_config

from .commands import experiment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
FILES = sorted(RESULTS.glob("*/seed*.json"))
LATER = {"model.shrinkage": 0.0}  # keys that the first files lack, with what was done before there was one
KEYS = ("command", "config", "commit", "date", "machine", "content", "protocol", "validation", "test")


@functools.cache
def _movable() -> tuple[str, ...]:
    """Keys that say where things lie on a machine."""
    return tuple(program("record").MOVABLE)


def program(name: str) -> ModuleType:
    """A module of experiments/results, which is no package."""
    spec = importlib.util.spec_from_file_location(f"results_{name}", RESULTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stated(command: str) -> dict[str, Any]:
    """The config of a `dynrec train …` command, flat; of several, of the first."""
    command = command.split(" && ")[0]
    values = flags.FlagValues()
    define_config(values)
    values(["train", *(each for each in shlex.split(command) if each.startswith("--config"))])
    return configs.flat(read_config(values))


def test_the_readme_has_the_tables_that_the_files_make():
    table = program("table")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table.between_marks(text, table.tables()) == text, "python experiments/results/table.py --write"


def test_every_file_is_in_a_table():
    rows = json.loads((RESULTS / "rows.json").read_text(encoding="utf-8"))
    named = {row["experiment"] for group in rows for row in group["rows"]}
    assert named == {path.parent.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_file_says_how_it_came_about_and_its_command_trains_that(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert set(KEYS) <= result.keys()
    assert path.stem == f"seed{result['config']['seed']}"
    assert {"ndcg@10", "recall@10"} <= result["test"].keys() & result["validation"].keys()
    # Aggregates alone: numbers by name, and of nobody.
    for part in ("validation", "test", *result["baselines"]):
        found = result[part] if part in result else result["baselines"][part]
        assert all(isinstance(value, float | int) for value in found.values()), part
    assert len(result["commit"]) == 40, "recorded from files that no commit has"
    monkeypatch.chdir(ROOT)
    now = stated(result["command"])
    assert result["config"].keys() <= now.keys()
    for key, value in now.items():
        if key.startswith("item.") and now["item.fusion"] == result["config"]["item.fusion"] == "id":
            continue  # what would describe an item besides its id
        if key not in _movable():
            expected = result["config"][key] if key in result["config"] else LATER[key]
            assert json.loads(json.dumps(value)) == expected, (
                f"{key}: the experiment file says otherwise by now"
            )


def test_a_row_is_the_mean_of_its_seeds_with_their_deviation():
    table = program("table")
    values = {"recall@10": 0.2, "ndcg@10": 0.1}
    seeds = [
        {
            "command": f"dynrec train --config.seed={seed} --workdir=runs/a/seed{seed}",
            "config": {"seed": seed},
            "date": f"2026-11-0{seed + 1}",
            "test": {**values, "ndcg@10": number},
            "validation": values,
        }
        for seed, number in enumerate((0.1, 0.2, 0.3))
    ]
    cells = table.row("a model", seeds)
    assert cells[:5] == ["a model", "0, 1, 2", "0.2000 ± 0.0000", "0.2000 ± 0.1000", "0.1000 ± 0.0000"]
    assert cells[5] == "`dynrec train --config.seed=K --workdir=runs/a/seedK`, 2026-11-03"
    assert table.row("a model", seeds[:1])[2:5] == ["0.2000", "0.1000", "0.1000"]


def test_differences_are_between_equal_seeds_in_percent_of_the_first_row():
    table = program("table")

    def seeds(values: dict[int, float]) -> list[dict[str, Any]]:
        return [{"config": {"seed": seed}, "test": {"ndcg@10": value}} for seed, value in values.items()]

    first = seeds({0: 0.10, 1: 0.20, 2: 0.90})
    # 0.09 - 0.10 and 0.22 - 0.20, of a mean of 0.15: -6.67 % and 13.33 %
    assert table.difference(seeds({0: 0.09, 1: 0.22}), first) == "+3.3 ± 14.1 %"
    assert table.difference(seeds({2: 0.81}), first) == "-10.0 %"
    assert table.difference(seeds({2: 0.81, 3: 0.5}), first) == "-10.0 % (seed 2)"
    assert table.difference([{**first[0], "together": [0, 1]}], first) == "", "several models beside one"
    assert table.difference(seeds({7: 0.81}), first) == ""


def test_a_table_says_its_protocol_and_refuses_two():
    table = program("table")
    keys = {"split": "leave_one_out", "filter_seen": True, "ties": "none", "users": 1_234, "catalogue": 5}

    def file(**changes: Any) -> dict[str, Any]:
        return {"protocol": {**keys, "target_events": "all", "query_time": False, **changes}}

    told = table.protocol("a set", [file(), file()])
    assert told == (
        "1,234 users, 5 items; leave-one-out; whole catalogue ranked; seen items masked; ties: none; "
        "not told when the next event is asked for"
    )
    assert table.protocol("a set", [file(), file(query_time=True)]).endswith("ties: none")
    with pytest.raises(SystemExit, match="a set: the rows differ in filter_seen: False, True"):
        table.protocol("a set", [file(), file(filter_seen=False)])


def test_the_tables_replace_what_stands_between_the_marks_alone():
    table = program("table")
    text = "before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n"
    made = table.between_marks(text, "new")
    assert made == "before\n<!-- results -->\n\nnew\n\n<!-- end of results -->\nafter\n"
    assert table.between_marks(made, "new") == made


def run_folder(at: Path, experiment: Path, **changes: Any) -> Path:
    """A run folder as `train` and `evaluate` leave it, of an experiment file with some keys changed."""
    config = read(experiment, **changes)
    (at / "evaluation").mkdir(parents=True)
    (at / "config.json").write_text(configs.to_json(config))
    for split, value in (("validation", 0.3), ("test", 0.2)):
        result = {
            "split": split, "users": 7, "catalogue": 9, "step": 40, "dataset": "abc", "ndcg@10": value,
            "recall@10": 2 * value, "protocol": {"split": "leave_one_out"}, "cold": {"users": 1.0},
            "baselines": {"popularity": {"ndcg@10": 0.1, "recall@10": 0.1}},
            "oracle": {"ndcg@10": 0.7, "recall@10": 0.8},
        }  # fmt: skip
        (at / "evaluation" / f"{split}.json").write_text(json.dumps(result))
    return at


def read(experiment: Path, **changes: Any) -> Any:
    values = flags.FlagValues()
    define_config(values)
    given = [f"--config.{key.replace('__', '.')}={value}" for key, value in changes.items()]
    values(["train", f"--config={experiment}", *given])
    return read_config(values)


@pytest.fixture
def experiment_file(tmp_path: Path) -> Path:
    return experiment(tmp_path / "shop.py", Path("data/shop"), train__steps=40)


def test_a_run_is_recorded_with_the_command_that_makes_it(
    experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    record = program("record")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "_commit", lambda: "0" * 40)
    changes = {"seed": 2, "dataset": "/elsewhere", "data__prefetch": 2}
    # What would describe an item besides its id does not matter to ids alone.
    workdir = run_folder(tmp_path / "a run", experiment_file, **changes, item__text_rate=0.75)
    given = [
        f"--config={experiment_file}",
        "--config.seed=2",
        "--config.data.prefetch=2",
        "--config.dataset=/elsewhere",
        "--config.data.cache_dir=cache",
    ]
    assert record.main([*given, f"--workdir={workdir}"]) == 0
    result = json.loads((tmp_path / "shop" / "seed2.json").read_text())
    assert set(KEYS) <= result.keys()
    assert result["test"] == {"ndcg@10": 0.2, "recall@10": 0.4}
    assert result["validation"] == {"ndcg@10": 0.3, "recall@10": 0.6}
    assert (result["content"], result["step"], result["protocol"]["users"]) == ("abc", 40, 7)
    assert result["command"] == (
        f"dynrec train --config={experiment_file} --config.data.prefetch=2 --config.data.cache_dir=cache "
        "--config.seed=2 --workdir=runs/shop/seed2 && dynrec evaluate --workdir=runs/shop/seed2"
    )
    assert result["baselines"]["oracle"] == {"ndcg@10": 0.7, "recall@10": 0.8}
    assert "dataset" not in result["config"]
    for key, value in stated(result["command"]).items():
        assert result["config"].get(key, value) == json.loads(json.dumps(value)), key


def test_seeds_that_recommend_together_are_recorded_as_one(
    experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    record, table = program("record"), program("table")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "_commit", lambda: "0" * 40)
    workdirs = [run_folder(tmp_path / f"seed{seed}", experiment_file, seed=seed) for seed in (1, 5)]
    given = [
        f"--config={experiment_file}",
        "--config.seed=1",
        f"--workdir={workdirs[0]}",
        f"--with={workdirs[1]}",
    ]
    assert record.main(given) == 2
    assert f"--split=validation --with={workdirs[1]}` first" in capsys.readouterr().err

    def measured(split: str, other: Path, step: int) -> None:
        result = json.loads((workdirs[0] / "evaluation" / f"{split}.json").read_text())
        result["ndcg@10"] = 0.4
        result["together"] = [
            {"workdir": str(workdirs[0]), "step": 40},
            {"workdir": str(other), "step": step},
        ]
        (workdirs[0] / "evaluation" / f"{split}_together.json").write_text(json.dumps(result))

    measured("validation", workdirs[1], 40)
    measured("test", tmp_path / "seed4", 40)
    assert record.main(given) == 2
    assert f"{workdirs[0]}, {tmp_path / 'seed4'} together; run `dynrec evaluate" in capsys.readouterr().err
    measured("test", workdirs[1], 20)
    assert record.main(given) == 2
    assert "measured at different steps" in capsys.readouterr().err
    measured("test", workdirs[1], 40)
    assert record.main([*given, "--name=shop"]) == 0, "a name of its own, beside that of single seeds"
    result = json.loads((tmp_path / "shop_together" / "seed1.json").read_text())
    assert (result["together"], result["test"]) == ([1, 5], {"ndcg@10": 0.4, "recall@10": 0.4})
    assert result["command"] == (
        f"dynrec train --config={experiment_file} --config.seed=1 --workdir=runs/shop/seed1 && "
        f"dynrec train --config={experiment_file} --config.seed=5 --workdir=runs/shop/seed5 && "
        "dynrec evaluate --workdir=runs/shop/seed1 --with=runs/shop/seed5"
    )
    cells = table.row("two", [result])
    assert (cells[1], cells[5]) == ("1 + 5", f"`{result['command']}`, {result['date']}")
    again = run_folder(tmp_path / "again", experiment_file, seed=1)
    assert record.main([*given[:3], f"--with={again}"]) == 2
    assert "the seeds are 1, 1; expected each once" in capsys.readouterr().err
    other = run_folder(tmp_path / "other", experiment_file, seed=5, model__dropout=0.75)
    assert record.main([*given[:3], f"--with={other}"]) == 2
    assert "model.dropout: 0.75, not 0.0" in capsys.readouterr().err


def test_a_run_of_other_settings_is_not_recorded(
    experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    record = program("record")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    workdir = run_folder(tmp_path / "run", experiment_file, model__dropout=0.75)
    assert record.main([f"--config={experiment_file}", f"--workdir={workdir}"]) == 2
    assert "model.dropout: 0.75, not 0.0" in capsys.readouterr().err
    (workdir / "evaluation" / "test.json").unlink()
    flag = "--config.model.dropout=0.75"
    assert record.main([f"--config={experiment_file}", flag, f"--workdir={workdir}"]) == 2
    assert "dynrec evaluate" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/seed*.json"))


@pytest.mark.parametrize("name", ["beauty", "ml1m"])
def test_every_change_of_an_experiment_is_a_config_that_differs(name: str):
    path = ROOT / "experiments" / f"{name}.py"
    plain = configs.flat(load(str(path)))
    for change in runpy.run_path(str(path))["CHANGES"]:
        config = load(f"{path}:{change}")
        configs.validate(config)
        assert (configs.flat(config) != plain) == bool(change)
    with pytest.raises(ConfigError, match="expected one of backward, hops"):
        load(f"{path}:nothing")
