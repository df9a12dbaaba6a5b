"""Folders of Hugging Face: every way to write one down, round trips, and what is refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from dynrec_jax.errors import ConfigError, DataError
from dynrec_jax.models import bert
from dynrec_jax.models.bert_config import read_config
from dynrec_jax.models.bert_weights import INDEX, WEIGHTS, read_weights, resolve, weights_hash

GOLDEN = Path(__file__).parent / "golden"
QUERY = "encoder.layer.1.attention.self.query.weight"
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def expected() -> Any:
    return read_weights(GOLDEN / "tiny", read_config(GOLDEN / "tiny"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "tiny", tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def change_config(folder: Path, **changes: Any) -> None:
    found = json.loads((folder / "config.json").read_text())
    found |= changes
    text = json.dumps({key: value for key, value in found.items() if value is not ...})
    (folder / "config.json").write_text(text)


def shard(folder: Path) -> dict[str, str]:
    """Cuts the weights into two files with an index; gives its map."""
    whole = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    where = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(whole)}
    for file in set(where.values()):
        save_file({name: whole[name] for name in whole if where[name] == file}, folder / file)
    write_index(folder, where)
    return where


def write_index(folder: Path, where: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def check_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float32, path
        np.testing.assert_array_equal(a, b)


def test_matrices_lie_as_the_products_need_them(expected):
    """PyTorch's weight maps inputs to outputs from the right: row `h · E + e` gives feature e of head h."""
    raw = load_file(GOLDEN / "tiny" / WEIGHTS)
    kernel = expected["layer_1"]["attention"]["query"]["kernel"]
    assert kernel.shape == (16, 4, 4)
    np.testing.assert_array_equal(kernel[:, 2, 3], raw[QUERY][2 * 4 + 3])
    out = expected["layer_0"]["attention"]["out"]["kernel"]
    np.testing.assert_array_equal(
        out[2, 3], raw["encoder.layer.0.attention.output.dense.weight"][:, 2 * 4 + 3]
    )


def with_prefix(folder: Path) -> None:
    heads = {"cls.predictions.bias": np.zeros(60, np.float32)}
    rewrite(folder, lambda t: {f"bert.{name}": value for name, value in t.items()} | heads)


def with_old_names(folder: Path) -> None:
    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    rewrite(folder, lambda t: {f"bert.{old(name)}": value for name, value in t.items()})


def with_position_numbers(folder: Path) -> None:
    rewrite(folder, lambda t: t | {"embeddings.position_ids": np.arange(20)[None]})


def without_the_pooler(folder: Path) -> None:
    rewrite(folder, lambda t: {name: value for name, value in t.items() if not name.startswith("pooler")})


@pytest.mark.parametrize(
    "variant", [with_prefix, with_old_names, with_position_numbers, without_the_pooler, shard]
)
def test_every_way_of_writing_it_down_gives_the_same(variant, folder, expected):
    variant(folder)
    check_same(read_weights(folder, read_config(folder)), expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(dtype, folder, expected):
    rewrite(folder, lambda t: {name: value.astype(dtype) for name, value in t.items()})
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), expected)
    check_same(read_weights(folder, read_config(folder)), rounded)


def test_old_configs_say_less(folder):
    change_config(folder, layer_norm_eps=..., pad_token_id=None, model_type=..., hidden_act=...)
    assert read_config(folder) == dataclasses.replace(read_config(GOLDEN / "tiny"), layer_norm_eps=1e-12)


def test_what_is_written_is_read_back_the_same(tmp_path, expected):
    module, variables = bert.from_pretrained(GOLDEN / "tiny")
    other = dataclasses.replace(module, config=dataclasses.replace(module.config, hidden_act="relu"))
    changed = jax.tree.map(lambda x: x * 3 + 1, variables)
    bert.save_pretrained(other, changed, tmp_path / "new" / "model")
    again, found = bert.from_pretrained(tmp_path / "new" / "model")
    assert again == other
    check_same(found["params"], jax.tree.map(lambda x: np.asarray(x) * 3 + 1, expected))
    assert sorted(path.name for path in (tmp_path / "new" / "model").iterdir()) == ["config.json", WEIGHTS]
    # And by PyTorch's names and shapes: all that it saved but the pooler.
    raw, golden = (load_file(at / WEIGHTS) for at in (tmp_path / "new" / "model", GOLDEN / "tiny"))
    assert {name: value.shape for name, value in raw.items()} == {
        name: value.shape for name, value in golden.items() if not name.startswith("pooler")
    }
    np.testing.assert_allclose(raw[QUERY], golden[QUERY] * 3 + 1, rtol=1e-6)
    config = json.loads((tmp_path / "new" / "model" / "config.json").read_text())
    assert (config["model_type"], config["hidden_act"]) == ("bert", "relu")


def test_boxed_params_can_be_written(tmp_path):
    module = bert.from_pretrained(GOLDEN / "tiny")[0]
    ids = jnp.zeros((1, 2), jnp.int32)
    boxed = jax.jit(module.init)(jax.random.key(0), ids, jnp.ones_like(ids))
    bert.save_pretrained(module, boxed, tmp_path)
    plain = jax.tree.map(np.asarray, nn.meta.unbox(boxed)["params"])
    check_same(bert.from_pretrained(tmp_path)[1]["params"], plain)


def test_options_reach_the_module():
    module, variables = bert.from_pretrained(
        GOLDEN / "tiny", dtype=jnp.bfloat16, remat=True, frozen_below=1, dropout=0.25
    )
    assert (module.dtype, module.remat, module.frozen_below, module.dropout) == (jnp.bfloat16, True, 1, 0.25)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "roberta", "model_type is 'roberta'; expected 'bert'"),
        ("is_decoder", True, "is_decoder is True; expected False"),
        ("add_cross_attention", True, "add_cross_attention is True"),
        (
            "position_embedding_type",
            "relative_key",
            "position_embedding_type is 'relative_key'; expected 'absolute'",
        ),
        (
            "hidden_act",
            "silu",
            "hidden_act is 'silu'; expected one of gelu, gelu_new, gelu_pytorch_tanh, relu",
        ),
        ("hidden_size", ..., "has no hidden_size"),
        ("hidden_size", "16", "hidden_size is '16'; expected a whole number of at least 1"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("vocab_size", True, "vocab_size is True"),
        ("num_attention_heads", 3, "num_attention_heads 3 does not divide hidden_size 16"),
        ("layer_norm_eps", 0, "layer_norm_eps is 0"),
        ("hidden_dropout_prob", 1.5, "hidden_dropout_prob is 1.5"),
        ("pad_token_id", 60, "pad_token_id is 60; expected less than vocab_size 60"),
    ],
)
def test_a_config_of_another_network_is_refused(key, value, message, folder):
    change_config(folder, **{key: value})
    check_refused(folder, folder / "config.json", message)


def check_refused(folder: Path, where: Path, message: str) -> None:
    """One line that begins with the file; and `from_pretrained` says it too."""
    with pytest.raises(DataError) as caught:
        bert.from_pretrained(folder)
    text = str(caught.value)
    assert text.startswith(f"{where}: "), text
    assert message in text
    assert "expected" in text
    assert "\n" not in text


def lacks(folder: Path) -> None:
    rewrite(folder, lambda t: {name: value for name, value in t.items() if name != QUERY})


def has_more(folder: Path) -> None:
    rewrite(folder, lambda t: t | {"encoder.layer.2.output.dense.bias": np.zeros(16, np.float32)})


def has_twice(folder: Path) -> None:
    rewrite(folder, lambda t: t | {f"bert.{QUERY}": t[QUERY]})


def has_another_shape(folder: Path) -> None:
    rewrite(folder, lambda t: t | {QUERY: np.zeros((16, 8), np.float32)})


def has_integers(folder: Path) -> None:
    rewrite(folder, lambda t: t | {QUERY: np.zeros((16, 16), np.int8)})


def has_nan(folder: Path) -> None:
    rewrite(folder, lambda t: t | {QUERY: np.full((16, 16), np.nan, np.float32)})


def is_cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def is_damaged(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\xff" * 1000)


def is_empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (has_more, "holds encoder.layer.2.output.dense.bias; expected a BERT encoder"),
        (has_twice, f"{QUERY} a second time"),
        (has_another_shape, f"{QUERY} has shape [16, 8]; expected [16, 16]"),
        (has_integers, f"{QUERY} is of type I8; expected F16, BF16, F32"),
        (has_nan, f"{QUERY} holds NaN or infinity"),
        (is_cut, "is damaged or no safetensors file"),
        (is_damaged, "is damaged or no safetensors file"),
        (is_empty, "is damaged or no safetensors file"),
    ],
)
def test_faults_of_the_weights_are_refused(fault, message, folder):
    fault(folder)
    check_refused(folder, folder / WEIGHTS, message)


def test_a_missing_tensor_is_named(folder):
    lacks(folder)
    check_refused(folder, folder, f"its weights lack {QUERY} and 0 more tensors")


def test_folders_that_are_no_model_are_refused(folder, tmp_path):
    check_refused(tmp_path / "none", tmp_path / "none", "no such folder")
    for text, message in ((b"{", "is no JSON"), (b"\xff\xfe", "is no JSON"), (b"[1]", "holds a JSON list")):
        (folder / "config.json").write_bytes(text)
        check_refused(folder, folder / "config.json", message)
    (folder / "config.json").unlink()
    check_refused(folder, folder / "config.json", "no such file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickle_is_refused_and_not_opened(name, folder):
    (folder / WEIGHTS).rename(folder / name)
    check_refused(folder, folder, f"its weights are {name}, which is pickle")


def test_no_weights_at_all(folder):
    (folder / WEIGHTS).unlink()
    check_refused(folder, folder, f"has neither {WEIGHTS} nor {INDEX}")


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "/etc/other.safetensors",
        "..",
        "a/b.safetensors",
        "other.bin",
        "..\\x.safetensors",
    ],
)
def test_an_index_that_points_elsewhere_is_never_followed(name, folder):
    where = shard(folder)
    shutil.copy(folder / where[QUERY], folder.parent / "other.safetensors")
    write_index(folder, where | {QUERY: name})
    check_refused(folder, folder / INDEX, f"names the file {name!r}; expected *.safetensors in this folder")


def test_faults_of_the_index_are_refused(folder):
    where = shard(folder)
    write_index(folder, [])
    check_refused(folder, folder / INDEX, "has no weight_map")
    (folder / INDEX).write_text("nothing")
    check_refused(folder, folder / INDEX, "is no JSON")
    write_index(folder, where)
    (folder / where[QUERY]).unlink()
    check_refused(folder, folder / INDEX, f"names {where[QUERY]}, which is missing")


def test_the_hash_is_of_config_and_weights(folder):
    base = weights_hash(GOLDEN / "tiny")
    assert len(base) == 64
    (folder / "vocab.txt").write_text("hello")
    assert weights_hash(folder) == base
    change_config(folder, hidden_act="relu")
    assert weights_hash(folder) != base
    shutil.copy(GOLDEN / "tiny" / "config.json", folder)
    assert weights_hash(folder) == base
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    assert weights_hash(folder) != base
    (folder / "config.json").unlink()
    with pytest.raises(DataError, match="no such file"):
        weights_hash(folder)


def test_the_hub_is_asked_for_what_looks_like_a_name_there_and_is_no_folder(tmp_path, monkeypatch):
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert set(allow_patterns) == {"*.safetensors", "*.json", "vocab.txt"}
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    for name in ("here/model", "model", "./owner/model", "/owner/model", "../owner", "a/b/c", str(GOLDEN)):
        assert resolve(name) == Path(name)
    assert asked == []
    assert resolve("owner/model-1.0") == tmp_path / "snapshot"
    assert asked == ["owner/model-1.0"]


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    def download(name: str, allow_patterns: list[str]) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConfigError) as caught:
        bert.from_pretrained("owner/model")
    assert str(caught.value).startswith(
        "owner/model: no such folder, and the Hugging Face hub did not give it (no network at"
    )
    assert "\n" not in str(caught.value)
