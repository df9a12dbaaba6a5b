"""Flags, experiment files and exit statuses, before any data is opened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynrec_jax import cli
from dynrec_jax.errors import MachineError, NonFiniteError, report_errors
from dynrec_jax.verbs import train
from dynrec_jax.verbs.experiment import read_config

from .commands import digest, experiment, one_line

VERBS = [
    "prepare",
    "train",
    "sweep",
    "evaluate",
    "compare",
    "report",
    "score",
    "explain",
    "export",
    "compile",
]
HEAD = "from dynrec_jax.config import default_config\ndef get_config():\n    c = default_config()\n"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def settings(here) -> Path:
    """An experiment file in a folder of its own."""
    (here / "settings").mkdir()
    return experiment(here / "settings" / "experiment.py", here / "dataset")


def refused(capsys, *arguments: object) -> str:
    """The one line of a command that must be a user's mistake and must leave nothing behind."""
    before = digest(Path.cwd())
    assert cli.main([str(argument) for argument in arguments]) == 2
    assert digest(Path.cwd()) == before
    return one_line(capsys)


def read(*arguments: object):
    values = train.define_flags()
    values(["dynrec train", *(str(argument) for argument in arguments)])
    return read_config(values)


def test_help_names_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert [verb for verb in VERBS if f"  {verb} " not in out] == []
    assert list(cli.VERBS) == VERBS


@pytest.mark.parametrize(
    ("verb", "names"),
    [
        ("prepare", "source out items text_columns user_column item_column time_column event_column "
                    "rating_column core min_rating missing ties pseudonymise shards"),
        ("train", "config workdir"),
        ("evaluate", "workdir split step"),
        ("score", "workdir out k users filter_seen split step"),
        ("explain", "workdir user item out picture split method steps step dataset check top"),
        ("export", "workdir out k filter_seen formats platforms faiss step dataset"),
        ("compile", "config topology slices out"),
    ],
)  # fmt: skip
def test_help_of_every_verb_prints_its_flags(verb, names, capsys):
    assert cli.main([verb, "--help"]) == 0
    out, err = capsys.readouterr()
    assert [name for name in names.split() if f"  --{name}: " not in out] == []
    assert err == ""


def test_no_verb_shows_the_overview_and_is_a_mistake(capsys):
    assert cli.main([]) == 2
    assert "usage: dynrec VERB" in capsys.readouterr().out


def test_an_unknown_verb_is_refused(here, capsys):
    line = refused(capsys, "trian", "--workdir=run")
    assert "'trian'" in line
    assert all(verb in line for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_flag_is_refused(verb, here, capsys):
    assert "'nonsense'" in refused(capsys, verb, "--nonsense=1", "--workdir=run", "--out=out")


@pytest.mark.parametrize("verb", VERBS)
def test_a_positional_argument_is_refused(verb, here, capsys):
    assert "'stray'" in refused(capsys, verb, "stray")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("prepare --out=out", "--source"),
        ("prepare --source=synthetic:users=3,items=3,seed=0", "--out"),
        ("train --config=settings/experiment.py", "--workdir"),
        ("train --workdir=run", "--config"),
        ("evaluate", "--workdir"),
        ("score --out=out", "--workdir"),
        ("score --workdir=run", "--out"),
        ("explain --user=1", "--workdir"),
        ("explain --workdir=run", "--user"),
        ("export --out=out", "--workdir"),
        ("export --workdir=run", "--out"),
        ("compile --config=settings/experiment.py", "--topology"),
        ("compile --topology=h100:8", "--config"),
    ],
)
def test_a_flag_that_is_missing_is_named(arguments, named, settings, capsys):
    line = refused(capsys, *arguments.split())
    assert named in line or named[2:] in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("prepare --source=synthetic:users=3,items=3,seed=0 --out=out --core=many", "--core=many"),
        ("prepare --source=synthetic:users=3,items=3,seed=0 --out=out --missing=maybe", "--missing=maybe"),
        ("evaluate --workdir=run --split=training", "--split=training"),
        ("evaluate --workdir=run --step=first", "--step=first"),
        ("score --workdir=run --out=out --k=ten", "--k=ten"),
        ("score --workdir=run --out=out --k=0", "--k=0"),
        ("score --workdir=run --out=out --filter_seen=perhaps", "--filter_seen=perhaps"),
        ("train --config=settings/experiment.py --workdir=run --config.train.steps=many", "config.train.steps=many"),
        ("train --config=settings/experiment.py --workdir=run --config.train.steps=1.5", "config.train.steps=1.5"),
        ("train --config=settings/experiment.py --workdir=run --config.train.steps=0", "config.train.steps"),
        ("train --config=settings/experiment.py --workdir=run --config.model.dropout=x", "config.model.dropout=x"),
        ("train --config=settings/experiment.py --workdir=run --config.model.normalise=7", "config.model.normalise=7"),
        ("train --config=settings/experiment.py --workdir=run --config.evaluation.ks=1,x", "config.evaluation.ks=1,x"),
        ("train --config=settings/experiment.py --workdir=run --config.loss.kind=half", "'half'"),
        ("train --config=settings/experiment.py --workdir=run --config.seed=99999999999", "config.seed"),
        ("train --config=settings/experiment.py --workdir=run --config.model.heads=3", "model.heads"),
    ],
)  # fmt: skip
def test_a_mistyped_value_is_named(arguments, named, settings, capsys):
    assert named in refused(capsys, *arguments.split())


@pytest.mark.parametrize(
    ("verb", "flag"),
    [
        ("prepare", "out"),
        ("train", "workdir"),
        ("sweep", "workdir"),
        ("evaluate", "workdir"),
        ("evaluate", "lists"),
        ("score", "out"),
        ("score", "cache_dir"),
        ("explain", "picture"),
        ("export", "out"),
        ("compare", "out"),
        ("report", "workdir"),
    ],
)
def test_an_address_of_a_store_is_no_folder_of_this_machine(verb, flag, here, capsys):
    said = refused(capsys, verb, f"--{flag}=gs://bucket/run")
    assert f"--{flag}=gs://bucket/run: dynrec {verb} takes a path of this machine here" in said


def test_an_unknown_config_key_is_refused_with_what_was_meant(settings, capsys):
    line = refused(capsys, "train", f"--config={settings}", "--workdir=run", "--config.train.stepz=3")
    assert "config.train.stepz" in line
    assert "config.train.steps" in line


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("def get_config(:\n", ":1: SyntaxError"),
        ("steps = 3\n", "no function get_config"),
        ("def get_config():\n    pass\n", "returned NoneType"),
        ("def get_config():\n    return {'train': 1}\n", "returned dict"),
        ("import not_there\n", ":1: ModuleNotFoundError"),
        ("raise SystemExit(0)\n", ":1: SystemExit"),
        (HEAD + "    c.train.stepz = 3\n    return c\n", ":4: AttributeError"),
        (HEAD + "    c.train.steps = 'many'\n    return c\n", ":4: TypeError"),
        (HEAD + "    c.unlock()\n    c.extra = 3\n    return c\n", "unknown keys extra"),
        (HEAD + "    c.unlock()\n    del c.seed\n    return c\n", "left out seed"),
        (HEAD + "    c.unlock()\n    del c.seed\n    c.seed = 'x'\n    return c\n", "seed is 'x'"),
        (HEAD + "    c.train.steps = -3\n    return c\n", "config.train.steps: -3"),
        ("# \udcff\n", "x.py"),
    ],
)
def test_an_experiment_file_that_fails_is_named_with_its_line(text, named, here, capsys):
    (here / "x.py").write_bytes(text.encode("utf-8", "surrogateescape"))
    line = refused(capsys, "train", "--config=x.py", "--workdir=run")
    assert "x.py" in line or line.startswith("dynrec: config.")
    assert named in line


@pytest.mark.parametrize(("path", "found"), [("nowhere.py", "no such file"), (".", "is a folder")])
def test_a_missing_config_file_is_refused(path, found, here, capsys):
    assert found in refused(capsys, "train", f"--config={path}", "--workdir=run")


def test_a_key_on_the_command_line_wins_over_the_file(settings):
    c = read(
        f"--config={settings}", "--config.train.steps=7", "--config.train.learning_rate=3e-2",
        "--noconfig.evaluation.filter_seen", "--config.model.normalise", "--config.evaluation.ks=2,4",
        "--config.evaluation.metric=ndcg@4", "--config.model.block=seed", "--config.model.feedforward=2",
    )  # fmt: skip
    assert (c.train.steps, c.train.learning_rate, c.evaluation.ks, c.model.block) == (7, 3e-2, (2, 4), "seed")
    assert (c.evaluation.filter_seen, c.model.normalise, c.model.feedforward) == (False, True, 2.0)
    assert (c.model.dim, c.is_locked) == (8, True)  # of the file; and complete


def test_a_file_that_was_changed_within_the_same_second_is_read_anew(here):
    path = here / "x.py"
    for seed in (1, 2):
        path.write_text(HEAD + f"    c.seed = {seed}\n    return c\n")
        os.utime(path, (1, 1))
        assert read("--config=x.py").seed == seed
    assert digest(here).keys() == {"x.py"}


def test_a_file_may_take_an_argument(here):
    (here / "y.py").write_text(
        "from dynrec_jax.config import default_config\n"
        "def get_config(seed):\n    c = default_config()\n    c.seed = int(seed)\n    return c\n"
    )
    assert read("--config=y.py:5").seed == 5


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MachineError("the disk is full"), 1),
        (OSError(28, "No space left on device"), 1),
        (OSError(13, "Permission denied", "/somewhere"), 1),
        (NonFiniteError("step 3: loss is nan"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_faults_of_the_machine_are_one_line(error, status, capsys):
    def work() -> None:
        raise error

    assert report_errors(work) == status
    one_line(capsys)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyError, TypeError])
def test_our_own_faults_keep_their_traceback(error):
    def work() -> None:
        raise error

    with pytest.raises(error):
        report_errors(work)


def test_the_script_itself_says_one_line(here):
    """A process of its own: nothing that JAX, Orbax or absl print at start or at exit comes on top."""
    (here / "x.py").write_text(HEAD + "    return c\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "dynrec_jax", "train", "--config=x.py", "--workdir=run", "--config.modle.dim=3"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "config.modle.dim" in done.stderr
    assert digest(here).keys() == {"x.py"}
