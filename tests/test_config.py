"""The config: whole, locked, checked, and used."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from dynrec_jax import config as configs
from dynrec_jax.errors import ConfigError

PACKAGE = Path(configs.__file__).parent


def test_an_unknown_key_is_refused():
    c = configs.default_config()
    with pytest.raises((AttributeError, KeyError), match="learning_rat"):
        c.train.learning_rat = 0.1


@pytest.mark.parametrize(
    ("key", "value"), [("train.steps", "many"), ("model.dropout", "0.1"), ("dataset", 3)]
)
def test_a_value_of_another_type_is_refused(key: str, value: Any):
    c = configs.default_config()
    with pytest.raises(TypeError):
        c.update_from_flattened_dict({key: value})


def test_the_defaults_are_valid():
    configs.validate(configs.default_config())


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("data.windows", "first", "config.data.windows: 'first' is not one of last, random"),
        ("model.block", "post", "config.model.block"),
        ("model.dtype", "float16", "config.model.dtype"),
        ("loss.kind", "hinge", "config.loss.kind"),
        ("loss.sampler", "hard", "config.loss.sampler"),
        ("loss.uniform_share", 1.5, "config.loss.uniform_share"),
        ("loss.calibration", -0.5, "config.loss.calibration"),
        ("train.steps", 0, "config.train.steps: 0; expected 1 or more"),
        ("seed", -1, "config.seed"),
        ("model.dropout", 1.0, "config.model.dropout"),
        ("model.dropout", 1.5, "expected a number from 0.0 to 1.0"),
        ("train.warmup", float("nan"), "config.train.warmup"),
        ("train.average", -0.5, "config.train.average"),
        ("train.average", 1.0, "config.train.average: 1.0 would never forget"),
        ("train.learning_rate", 0.0, "config.train.learning_rate: 0.0; expected a number greater than 0"),
        ("model.temperature", -0.1, "config.model.temperature"),
        ("model.heads", 3, "does not divide by model.heads=3"),
        ("train.accumulation", 3, "does not divide by accumulation=3"),
        ("evaluation.holdout", 0.6, "config.evaluation.holdout"),
        ("evaluation.ks", (0, 5), "config.evaluation.ks"),
        ("evaluation.ks", (), "config.evaluation.ks"),
        ("evaluation.metric", "ndcg@11", "config.evaluation.metric: 'ndcg@11' is not one of"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(key: str, value: Any, said: str):
    c = configs.default_config()
    c.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError) as caught:
        configs.validate(c)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_both_weights_at_0_and_hops_without_a_catalogue_are_refused():
    c = configs.default_config()
    c.update_from_flattened_dict({"model.forward_weight": 0.0, "model.backward_weight": 0.0})
    with pytest.raises(ConfigError, match="nothing would be trained"):
        configs.validate(c)
    for kind in ("sampled", "gbce"):
        c = configs.default_config()
        c.update_from_flattened_dict({"model.hops": 1, "loss.kind": kind})
        with pytest.raises(ConfigError, match="a refined query needs the whole catalogue"):
            configs.validate(c)


def test_targets_are_shared_in_the_full_softmax_alone():
    c = configs.default_config()
    c.update_from_flattened_dict({"loss.neighbours": 0.2, "loss.kind": "gbce"})
    with pytest.raises(ConfigError, match=r"config\.loss\.neighbours: 0\.2 shares a target"):
        configs.validate(c)


def attributes_read() -> set[str]:
    """Names that the package reads as attributes, but for the module that writes the defaults."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name == "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


def test_every_default_key_is_read_somewhere():
    read = attributes_read()
    unread = {key for key in configs.flat(configs.default_config()) if key.split(".")[-1] not in read}
    assert unread == set()


def test_json_gives_the_config_back(tmp_path: Path):
    c = configs.default_config()
    c.update_from_flattened_dict(
        {"train.steps": 7, "evaluation.ks": (2, 10), "dataset": "Ä/b", "model.dropout": 0.25}
    )
    path = tmp_path / "config.json"
    path.write_text(configs.to_json(c), encoding="utf-8")
    again = configs.from_json(path)
    assert configs.flat(again) == configs.flat(c)
    assert again.evaluation.ks == (2, 10)
    assert again.is_locked
    assert list(json.loads(path.read_text())) == sorted(json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "holds a list"),
        ('{"train": {"stepz": 3}}', "unknown key train.stepz"),
        ('{"train": 3}', "train is 3; expected a JSON object"),
        ('{"train": {"steps": "many"}}', "train.steps"),
        ('{"train": {"steps": 12}}', "has no compiled_dir, data.augmented"),
    ],
)
def test_a_stored_config_that_is_not_one_is_refused(tmp_path: Path, text: str, said: str):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        configs.from_json(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_config_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file"):
        configs.from_json(tmp_path / "config.json")


def test_the_difference_names_what_changes_the_result_and_nothing_else():
    old, new = configs.default_config(), configs.default_config()
    new.update_from_flattened_dict(
        {
            "mesh.data": 4,
            "logging.every": 3,
            "data.cache_dir": "/tmp/x",
            "data.prefetch": 1,
            "train.checkpoint_every": 5,
            "train.keep_last": 9,
            "evaluation.batch_size": 8,
        }
    )
    assert configs.difference(old, new) == []
    new.update_from_flattened_dict({"train.learning_rate": 0.5, "evaluation.ks": (10,)})
    lines = configs.difference(old, new)
    assert lines == ["evaluation.ks: [1, 5, 10, 20, 50, 100] -> [10]", "train.learning_rate: 0.008 -> 0.5"]
