"""The text of items: what is read, and vectors of a frozen BERT, which are computed once and kept."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file, save_file

from dynrec_jax.data.dataset import open_dataset
from dynrec_jax.data.tokens import load_tokenizer, save_tokenizer, tokenize, train_tokenizer
from dynrec_jax.errors import ConfigError, MachineError
from dynrec_jax.models.bert import from_pretrained, pool
from dynrec_jax.models.towers import text
from dynrec_jax.models.towers.tower import Job

from ... import tiny

TEXTS = ["red lamp of glass", "blue lamp", "red chair of wood", "blue glass", "", ""]
READ: dict[str, Any] = {"item__text": ("title", "more"), "item__text_tokens": 12}


@pytest.fixture
def frozen(job: Any, shop: Any, bert: Path, tmp_path: Path) -> Callable[..., Job]:
    """A job that reads text with a frozen BERT, from a copy of the dataset."""
    copy = open_dataset(shutil.copytree(shop.path, tmp_path / "shop"))

    def make(items: Any = None, **keys: Any) -> Job:
        keys = {**READ, "item__bert": str(bert), "data__cache_dir": str(tmp_path / "cache"), **keys}
        made = job(items, **keys)
        return Job(made.config, copy, copy.items_table() if items is None else items)

    return make


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts BERT was given, each time."""
    found: list[int] = []
    encode = text.encode_items

    def count(encoder: Any, weights: Any, ids: Any, *rest: Any) -> Any:
        found.append(len(ids))
        return encode(encoder, weights, ids, *rest)

    monkeypatch.setattr(text, "encode_items", count)
    return found


def by_hand(bert: Path, texts: list[str], pooling: Any = "mean", tokens: int = 12) -> np.ndarray:
    """All texts in one batch, as the library's own functions give them."""
    module, variables = from_pretrained(bert)
    ids, lengths = tokenize(load_tokenizer(bert), texts, tokens)
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int32)
    encode = jax.jit(lambda variables: pool(module.apply(variables, ids, mask), jnp.asarray(mask), pooling))
    return np.asarray(encode(variables))


def kept(job: Job) -> list[Path]:
    return sorted(job.dataset.path.with_name(f"{job.dataset.path.name}.vectors").glob("*"))


def test_columns_are_joined_in_the_order_of_the_config(job):
    def texts(*columns: str) -> list[str]:
        made = job(**{**READ, "item__text": columns, "item__text_mode": "tuned"})
        return text.texts_of(made.config, made.items, made.dataset)

    assert texts("title", "more") == TEXTS
    assert texts("more", "title")[0] == "of glass red lamp"
    assert texts("tags", "title")[:2] == ["s, t red lamp", "t blue lamp"]
    for column, named in (("nothing", "no item column 'nothing'; found"), ("v", "'v' is list")):
        with pytest.raises(ConfigError, match=f"config.item.text: .*{named}"):
            texts("title", column)


def test_new_items_may_lack_a_column(job):
    new = pa.table({"index": [7], "item_id": ["g"], "more": ["of wood"]})
    made = job(new, **READ, item__text_mode="tuned")
    assert text.texts_of(made.config, new, made.dataset) == ["of wood"]
    assert text.texts_of(made.config, new.drop_columns("more"), made.dataset) == [""]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_what_the_model_gives_by_hand_less_their_mean(pooling, frozen, bert, counted):
    made = frozen(item__text_pooling=pooling)
    (tower,) = text.read(made)
    (values,) = tower.values.values()
    v = by_hand(bert, TEXTS, pooling)
    assert not v[4:].any()
    np.testing.assert_allclose(values.array, v, atol=2e-5)
    expected = np.concatenate([v[:4] - v[:4].mean(axis=0), np.zeros((2, 16))])
    np.testing.assert_allclose(values.rows(np.arange(6)), expected, atol=2e-5)
    assert np.abs(expected[:4]).min(axis=1).all()
    # They lie beside the dataset, and a second read computes nothing.
    assert len(kept(made)) == 1
    assert counted == [6]
    (again,) = text.read(made)
    np.testing.assert_array_equal(again.values["text"].array, values.array)
    assert counted == [6]


def test_new_items_are_centred_by_the_datasets_mean(frozen, bert, counted):
    new = pa.table({"index": [7, 8], "item_id": ["g", "h"], "title": ["blue chair", None]})
    (own,), (later,) = text.read(frozen()), text.read(frozen(new))
    v = by_hand(bert, [*TEXTS, "blue chair"])
    both = own.followed_by(later).values["text"].rows(np.array([0, 6, 7, 2]))
    mean = v[:4].mean(axis=0)
    np.testing.assert_allclose(both, [v[0] - mean, v[6] - mean, np.zeros(16), v[2] - mean], atol=2e-5)
    np.testing.assert_allclose(later.values["text"].rows(np.array([0])), [v[6] - mean], atol=2e-5)
    assert counted == [6, 2]


def change_text(bert: Path, keys: dict[str, Any]) -> None:
    keys["item__text"] = ("more", "title")


def change_weights(bert: Path, keys: dict[str, Any]) -> None:
    file = bert / "model.safetensors"
    weights = load_file(file)
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"] * 1.5
    save_file(weights, file)


def change_tokenizer(bert: Path, keys: dict[str, Any]) -> None:
    save_tokenizer(train_tokenizer(["lamp glass chair wood of red blue", "glass"], 50), bert)


def change_pooling(bert: Path, keys: dict[str, Any]) -> None:
    keys["item__text_pooling"] = "cls"


def change_length(bert: Path, keys: dict[str, Any]) -> None:
    keys["item__text_tokens"] = 8


@pytest.mark.parametrize(
    "change", [change_text, change_weights, change_tokenizer, change_pooling, change_length]
)
def test_they_are_made_anew_when_what_they_depend_on_changes(change, frozen, bert, counted):
    (before,) = text.read(frozen())
    keys: dict[str, Any] = {}
    change(bert, keys)
    made = frozen(**keys)
    (after,) = text.read(made)
    assert counted == [6, 6]
    assert len(kept(made)) == 2
    assert np.abs(after.values["text"].array - before.values["text"].array).max() > 1e-3


def test_a_dataset_that_cannot_be_written_beside_falls_back_on_the_cache(frozen, counted, tmp_path):
    made = frozen()
    beside = made.dataset.path.with_name("shop.vectors")
    beside.write_text("no folder can be made here")  # as root writes into any folder, whatever its mode
    (first,) = text.read(made)
    assert len(list((tmp_path / "cache" / "vectors").glob("*.npy"))) == 1
    (again,) = text.read(made)
    assert counted == [6]
    np.testing.assert_array_equal(first.values["text"].array, again.values["text"].array)


def test_nowhere_to_write_is_told(frozen, tmp_path):
    made = frozen()
    made.dataset.path.with_name("shop.vectors").write_text("")
    (tmp_path / "cache").write_text("")
    with pytest.raises(
        MachineError, match=r"cache/vectors: vectors of texts cannot be written .*set --cache_dir"
    ):
        text.frozen_vectors(made)


def test_nothing_half_written_stays(frozen, monkeypatch):
    made = frozen()

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(text, "encode_items", fail)
    with pytest.raises(RuntimeError):
        text.frozen_vectors(made)
    assert kept(made) == []


def test_a_run_folder_needs_the_model_no_more(frozen, bert, counted, tmp_path):
    """Vectors of the copy are those of the folder that it was made from: none is computed twice."""
    made = frozen()
    (before,) = text.read(made)
    (tmp_path / "run").mkdir()
    text.keep_text_model(made.config, made.dataset, tmp_path / "run")
    shutil.rmtree(bert)
    (after,) = text.read(Job(made.config, made.dataset, made.items, tmp_path / "run"))
    np.testing.assert_array_equal(after.values["text"].array, before.values["text"].array)
    assert counted == [6]


def test_a_model_from_scratch_has_a_tokenizer_of_the_texts(job, tmp_path):
    sizes = {"item__text_dim": 8, "item__text_layers": 1, "item__text_heads": 2, "item__text_vocabulary": 64}
    made = job(**{**READ, "item__text_tokens": 24}, item__text_mode="tuned", **sizes)
    text.keep_text_model(made.config, made.dataset, tmp_path)
    source = text.text_source(Job(made.config, made.dataset, made.items, tmp_path))
    assert source.weights is None
    tokenizer = load_tokenizer(tmp_path / "bert")
    assert [tokenizer.decode(row) for row in source.ids[:, 1:].tolist()] == TEXTS
    assert source.lengths[4:].tolist() == [0, 0]
    assert source.encoder.bert.config.max_position_embeddings == 24
    # Random weights: only the tower's shape is known yet.
    (tower,) = text.read(Job(made.config, made.dataset, made.items, tmp_path))
    assert (tower.values, tower.shapes) == ({}, (("text", 8, "float32"),))


@pytest.mark.parametrize(
    ("changes", "sizes", "part"),
    [
        ({"num_attention_heads": 1}, (1, 1, 2), "mesh.tensor: 2 does not divide the 1 heads of"),
        ({"intermediate_size": 15}, (1, 1, 2), "mesh.tensor: 2 does not divide the 15 hidden units of"),
        (
            {"hidden_size": 6, "num_attention_heads": 2},
            (1, 4, 1),
            "mesh.fsdp: 4 does not divide the width of",
        ),
    ],
)
def test_a_bert_that_does_not_divide_over_the_mesh_is_refused(changes, sizes, part, job, bert):
    config = json.loads((bert / "config.json").read_text())
    tuned = job(**READ, item__bert=str(bert), item__text_mode="tuned")
    text.check_text_mesh(tuned, tiny.mesh(1, 1, 2))
    (bert / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ConfigError, match=f"{part} {bert}"):
        text.check_text_mesh(tuned, tiny.mesh(*sizes))
