"""Every experiment file is a config that trains; the framework's own settings do so from the log to the lists."""

from pathlib import Path

import pytest

from dynrec_jax import config as configs
from dynrec_jax.verbs.experiment import load

from .commands import dynrec, make

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
FILES = [
    path
    for path in sorted([*EXPERIMENTS.glob("*.py"), *EXPERIMENTS.glob("sweeps/*.py")])
    if "def get_config" in path.read_text(encoding="utf-8")
]
# Keys in which the small model of the tests differs from the defaults by more than size.
SHIPPED = ("data.windows", "model.positions", "model.backward_weight", "model.dropout", "train.average")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_is_a_config(path: Path):
    config = load(str(path))
    if config.item.text and config.item.text_mode == "frozen":
        config.item.bert = config.item.bert or "a folder that is named on the command line"
    configs.validate(config)


def test_default_is_nothing_but_the_defaults_on_a_dataset():
    found = configs.flat(load(f"{EXPERIMENTS / 'default.py'}:mine"))
    assert found == {**configs.flat(configs.default_config()), "dataset": "data/mine"}


def test_the_shipped_settings_train_are_measured_and_recommend(tmp_path: Path):
    defaults = configs.flat(configs.default_config())
    made = make(tmp_path, **{key.replace(".", "__"): defaults[key] for key in SHIPPED})
    trained = configs.flat(configs.from_json(made.workdir / "config.json"))
    assert {key: trained[key] for key in SHIPPED} == {key: defaults[key] for key in SHIPPED}
    assert dynrec("evaluate", workdir=made.workdir) == 0
    assert dynrec("score", workdir=made.workdir, out=tmp_path / "lists", k=5) == 0
