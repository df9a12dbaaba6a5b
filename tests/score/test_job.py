"""What the lists hold: ids as in the source, the right history, and no more than there is to offer."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dynrec_jax import workdir as workdirs
from dynrec_jax.errors import ConfigError
from dynrec_jax.score.job import score
from dynrec_jax.score.options import ScoreOptions

from ..commands import dynrec
from .conftest import ITEMS


def test_the_files_are_plain_parquet_with_the_ids_of_the_source(lists, histories):
    files = sorted(lists.glob("*.parquet"))
    assert [file.name for file in files] == ["part-00000-of-00001.parquet"]
    table = pq.read_table(files[0])
    assert table.schema.names == ["user_id", "item_ids", "scores"]
    assert table.schema.types == [pa.string(), pa.list_(pa.string()), pa.list_(pa.float32())]
    frame = pd.read_parquet(lists)  # the folder as a whole, as the README reads it
    assert sorted(frame["user_id"]) == sorted(histories)  # users who are not evaluated too
    assert {item for row in frame["item_ids"] for item in row} <= set(ITEMS)
    for row in frame.itertuples():
        assert len(set(row.item_ids)) == len(row.scores) == 5
        assert (np.diff(row.scores) <= 0).all()


def test_all_recommends_from_the_whole_history_and_a_split_from_what_evaluation_sees(
    shop, histories, tmp_path
):
    shown = {}
    for split in ("all", "test", "validation"):
        out = tmp_path / split
        assert dynrec("score", "filter_seen", workdir=shop.workdir, out=out, split=split, k=16) == 0
        frame = pd.read_parquet(out)
        shown[split] = {row.user_id: set(row.item_ids) for row in frame.itertuples()}
    asked = {user for user, history in histories.items() if len(history) >= 3}
    assert shown["test"].keys() == shown["validation"].keys() == asked
    for cut, split in ((None, "all"), (-1, "test"), (-2, "validation")):
        for user, items in shown[split].items():
            # Everything is offered but what the history holds: lists are shorter than k where little is left.
            assert items == set(ITEMS) - set(histories[user][:cut])
    assert len(shown["all"]["42"]) == 3


def test_longer_than_the_catalogue_is_refused_before_anything_is_written(shop, tmp_path):
    run = workdirs.open(shop.workdir)
    with pytest.raises(ConfigError, match=r"--k=17: the catalogue has 16 items"):
        score(run, tmp_path / "out", ScoreOptions(k=17))
    assert not (tmp_path / "out").exists()
