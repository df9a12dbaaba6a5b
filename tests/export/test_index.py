"""The index holds what ABRA's attention scores, asked with the vectors that the exported query program gives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.errors import ConfigError
from dynrec_jax.evaluate.recommender import Lists
from dynrec_jax.export import index
from dynrec_jax.export.folder import ExportOptions, check
from dynrec_jax.export.runner import Runner

from .runs import answers, assert_same, exported, lines, recommended, untrained


def test_without_the_package_it_is_told_how_to_get_it(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(index.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dynrec-jax\[faiss\]'"):
        check(ExportOptions(formats=("faiss",)), tmp_path / "out")


def searched(folder: Path, histories: Histories, k: int = 6) -> tuple[np.ndarray, Lists]:
    """Users' vectors as the runner gives them, [U, I, D], and what the index finds with each, [U · I, k]."""
    faiss = pytest.importorskip("faiss")
    vectors = np.array([line["vectors"] for line in answers(Runner(folder, "query"), lines(histories))])
    found = faiss.read_index(str(folder / "items.faiss"))
    scores, numbers = found.search(vectors.reshape(-1, vectors.shape[-1]).astype(np.float32), k)
    return vectors, Lists(numbers + 1, scores)


def test_an_exact_index_finds_what_the_model_recommends(
    tiny_dataset: Dataset, histories: Histories, tmp_path: Path
):
    """Inner products are the scores, and number j of the index is the item at j of `item_ids.json`."""
    pytest.importorskip("faiss")
    run = untrained(tiny_dataset, model__hops=1, model__normalise=True)
    folder = exported(run, tmp_path / "out", formats=("faiss",))
    assert not (folder / "recommend.stablehlo").exists()
    items = json.loads((folder / "item_ids.json").read_text())
    _, found = searched(folder, histories)
    made = [
        {"item_ids": [items[i - 1] for i in ids], "scores": scores}
        for ids, scores in zip(found.ids, found.scores, strict=True)
    ]
    assert_same(made, recommended(run, histories), items)
    facts = Runner(folder, "query").manifest["index"]
    assert (facts["recall"], facts["listed"], facts["users"]) == (1.0, 1.0, histories.users)


def test_what_an_index_leaves_out_is_said_and_measured(
    tiny_dataset: Dataset, histories: Histories, tmp_path: Path
):
    pytest.importorskip("faiss")
    run = untrained(tiny_dataset, model__interests=2, model__neighbours=3.0)
    folder = exported(run, tmp_path / "out", formats=("faiss",))
    vectors, found = searched(folder, histories)
    assert vectors.shape == (histories.users, 2, 8)
    facts = Runner(folder, "query").manifest["index"]
    expected = recommended(run, histories)
    of_users = found.ids.reshape(histories.users, -1)
    shares = [np.isin(ids, own).mean() for ids, own in zip(expected.ids, of_users, strict=True)]
    assert facts["recall"] == 1.0
    assert facts["listed"] == pytest.approx(np.mean(shares))
    assert facts["listed"] < 1
    told = index.told(facts, run)
    assert f"recall@6 1.0000 of exact search, {facts['listed']:.4f} of what is recommended" in told[0]
    assert "leaves out counts of neighbours" in told[1]
    assert "a user has 2 vectors" in told[2]


@pytest.mark.slow
def test_an_index_that_is_not_exact_says_how_much_it_misses(
    tiny_dataset: Dataset, histories: Histories, tmp_path: Path
):
    pytest.importorskip("faiss")
    run = untrained(tiny_dataset)
    recalls = {}
    for probes in (1, 2):
        options: dict[str, Any] = {
            "factory": "IVF2,Flat",
            "search": f"nprobe={probes}",
            "formats": ("faiss",),
        }
        folder = exported(run, tmp_path / str(probes), **options)
        recalls[probes] = json.loads((folder / "export.json").read_text())["index"]["recall"]
        exact = recommended(run, histories)
        _, found = searched(folder, histories)
        shares = [np.isin(ids, own).mean() for ids, own in zip(exact.ids, found.ids, strict=True)]
        assert recalls[probes] == pytest.approx(np.mean(shares)), "the file searches as was measured"
    assert recalls[1] < recalls[2] == 1.0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"factory": "Nonsense7"}, "--faiss=Nonsense7: FAISS makes no index of that"),
        ({"factory": "Flat", "search": "nprobe=many"}, "--faiss_search=nprobe=many: the index has no such"),
        ({"factory": "IVF64,Flat"}, "--faiss=IVF64,Flat: cannot be made of 25 items"),
    ],
)
def test_an_index_that_cannot_be_is_refused(tiny_dataset: Dataset, tmp_path: Path, options: Any, told: str):
    pytest.importorskip("faiss")
    with pytest.raises(ConfigError, match=told.replace("(", r"\(")):
        exported(untrained(tiny_dataset), tmp_path / "out", formats=("faiss",), **options)
    assert list(tmp_path.iterdir()) == []
