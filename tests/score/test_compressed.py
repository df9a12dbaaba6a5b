"""A compressed model by the commands: what is measured is what is written, beside the run's own result."""

import json
from pathlib import Path

import pandas as pd
import pytest

from dynrec_jax import cli
from dynrec_jax.parallel.compressed import KINDS
from dynrec_jax.verbs import compressed

from ..commands import digest, dynrec, one_line
from .test_parity import metrics_of, same

SMALL = {"table": "int8", "encoder": "int8", "prune": 0.25}


def test_what_is_measured_is_what_is_written_and_both_say_how(shop, histories, tmp_path, capsys):
    assert dynrec("evaluate", workdir=shop.workdir) == 0
    own = digest(shop.workdir)
    out = tmp_path / "out"
    assert dynrec("evaluate", workdir=shop.workdir, **SMALL) == 0
    path = shop.workdir / "evaluation" / "test_table_int8_encoder_int8_prune_0.25.json"
    assert str(path) in capsys.readouterr().out
    assert dynrec("score", "filter_seen", workdir=shop.workdir, out=out, split="test", k=16, **SMALL) == 0
    items = sorted({item for history in histories.values() for item in history}, key=str.encode)
    result = json.loads(path.read_text())
    same(result, metrics_of(pd.read_parquet(out), histories, items))
    manifest = json.loads((out / "_score.json").read_text())
    assert result["compressed"] == manifest["compressed"] == SMALL
    path.unlink()
    assert digest(shop.workdir) == own, "nothing else was written"
    # The same command finds its parts; another compression is another job.
    again = {"workdir": shop.workdir, "out": out, "split": "test", "k": 16}
    assert dynrec("score", "filter_seen", **again, **SMALL) == 0
    assert "were there already" in capsys.readouterr().out
    assert dynrec("score", "filter_seen", **again, table="int8") == 2
    assert "holds the output of another job (compressed:" in one_line(capsys)


def test_lists_of_a_compressed_encoder_are_made_anew_and_those_of_a_compressed_table_are_not(
    shop, tmp_path, capsys
):
    asked = {"workdir": shop.workdir, "k": 5, "diversify": 0.5, "pool": 10}
    assert dynrec("score", out=tmp_path / "encoder", encoder="int8", **asked) == 0
    plain = {"workdir": shop.workdir, "k": 10, "encoder": "int8"}
    assert dynrec("score", out=tmp_path / "pools", **plain) == 0
    pools = pd.read_parquet(tmp_path / "pools").set_index("user_id")["item_ids"]
    found = pd.read_parquet(tmp_path / "encoder").set_index("user_id")["item_ids"]
    assert all(set(items) <= set(pools[user]) for user, items in found.items())
    assert any(list(items) != list(pools[user][:5]) for user, items in found.items())
    capsys.readouterr()
    assert dynrec("score", out=tmp_path / "table", table="int8", **asked) == 2
    assert "--diversify and --table: one of them alone" in one_line(capsys)
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize(
    ("verb", "flags", "told"),
    [
        (
            "evaluate",
            ["--drift", "--table=int8"],
            "--drift: is of a run as it is; leave --table, --encoder and",
        ),
        ("evaluate", ["--prequential=3", "--prune=0.1"], "--prequential: is of a run as it is"),
        ("evaluate", ["--prune=1.5"], "--prune=1.5: expected a share of the weights, from 0 to less than 1"),
        ("score", ["--out=somewhere", "--prune=-0.1"], "--prune=-0.1: expected a share"),
        ("score", ["--out=somewhere", "--table=int4"], "value should be one of <float32|bfloat16|int8>"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(verb, flags, told, tmp_path: Path, capsys):
    assert cli.main([verb, f"--workdir={tmp_path}", *flags]) == 2
    assert told in one_line(capsys)


def test_the_flags_know_all_kinds():
    assert list(KINDS) == compressed.KINDS
