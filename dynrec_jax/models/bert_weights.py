"""The tensors of a BERT, between Hugging Face's folders and the params of `bert.Bert`.

A folder holds `config.json` and either `model.safetensors` or several files with `model.safetensors.index.json`. Names
may begin with `bert.`, as in checkpoints with heads, and norms may be called gamma and beta, as in old ones. Files of
pickle are refused: opening one runs whatever code lies in it.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dynrec_jax.errors import ConfigError, DataError, one_line
from dynrec_jax.files import write_whole
from dynrec_jax.models.bert_config import CONFIG, BertConfig, read_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWNLOADED = ("*.safetensors", "*.json", "vocab.txt")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What checkpoints have besides the encoder, and what Bert does without: the pooler, the heads of pre-training, and
# the numbers 0, 1, 2, … that old files hold.
LEFT_OUT = ("pooler.", "cls.", "embeddings.position_ids")
FLOATS = ("F16", "BF16", "F32")  # safetensors' names of the types that are read
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class Tensor(NamedTuple):
    """One tensor under its two names.

    Attributes:
      name: Hugging Face's, without the prefix.
      path: in the params.
      shape: in the file.
      ours: shape in the params, where the axis of heads is its own.
      turned: whether it is a matrix, which the file holds the other way round: outputs, inputs.
    """

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    ours: tuple[int, ...]
    turned: bool


def resolve(name: str | Path) -> Path:
    """The folder of that name or, where none is there and it looks like `owner/model`, its download from the hub.

    Raises:
      ConfigError: there is no such folder, and nothing of that name could be had from the hub.
    """
    folder = Path(name)
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        return folder
    import huggingface_hub  # takes a third of a second, and most names are folders

    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(DOWNLOADED)))
    except Exception as error:  # of the network, of the hub, of the disk: it has dozens of them
        raise ConfigError(
            f"{name}: no such folder, and the Hugging Face hub did not give it ({one_line(error)[:200]});"
            " expected the folder of a BERT, or a name on the hub and a network"
        ) from None


def tensors(config: BertConfig) -> Iterator[Tensor]:
    """All tensors of the encoder, in the order of the computation."""
    dim, hidden = config.hidden_size, config.intermediate_size
    heads = (config.num_attention_heads, dim // config.num_attention_heads)

    def matrix(
        name: str, path: tuple[str, ...], into: tuple[int, ...], out: tuple[int, ...]
    ) -> Iterator[Tensor]:
        shape = (math.prod(out), math.prod(into))
        yield Tensor(f"{name}.weight", (*path, "kernel"), shape, (*into, *out), turned=True)
        yield Tensor(f"{name}.bias", (*path, "bias"), shape[:1], out, turned=False)

    def norm(name: str, *path: str) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", (*path, "scale"), (dim,), (dim,), turned=False)
        yield Tensor(f"{name}.bias", (*path, "bias"), (dim,), (dim,), turned=False)

    for ours, theirs, rows in (
        ("word", "word", config.vocab_size),
        ("position", "position", config.max_position_embeddings),
        ("type", "token_type", config.type_vocab_size),
    ):
        yield Tensor(
            f"embeddings.{theirs}_embeddings.weight", (ours,), (rows, dim), (rows, dim), turned=False
        )
    yield from norm("embeddings.LayerNorm", "embedding_norm")
    for index in range(config.num_hidden_layers):
        name, layer = f"encoder.layer.{index}", f"layer_{index}"
        for part in ("query", "key", "value"):
            yield from matrix(f"{name}.attention.self.{part}", (layer, "attention", part), (dim,), heads)
        yield from matrix(f"{name}.attention.output.dense", (layer, "attention", "out"), heads, (dim,))
        yield from norm(f"{name}.attention.output.LayerNorm", layer, "attention_norm")
        yield from matrix(f"{name}.intermediate.dense", (layer, "up"), (dim,), (hidden,))
        yield from matrix(f"{name}.output.dense", (layer, "down"), (hidden,), (dim,))
        yield from norm(f"{name}.output.LayerNorm", layer, "feedforward_norm")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in the order of their names.

    Raises:
      DataError: there are none, or the index names a file that is missing or lies elsewhere.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise DataError(_no_weights(folder))
    names = read_object(folder / INDEX, "a weight_map").get("weight_map")
    if not isinstance(names, dict) or not names:
        raise DataError(f"{folder / INDEX}: has no weight_map; expected {{tensor: file}}")
    files = []
    for name in sorted(set(map(str, names.values()))):
        # By its letters, and never followed: the hub's cache is made of links, so where a file lies says nothing.
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise DataError(
                f"{folder / INDEX}: names the file {name!r}; expected *.safetensors in this folder"
            )
        if not (folder / name).is_file():
            raise DataError(
                f"{folder / INDEX}: names {name}, which is missing; expected all files of the model"
            )
        files.append(folder / name)
    return files


def _no_weights(folder: Path) -> str:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if not pickled:
        return f"{folder}: has neither {WEIGHTS} nor {INDEX}; expected the weights of a BERT"
    return (
        f"{folder}: its weights are {', '.join(pickled)}, which is pickle: opening it runs any code that lies in it;"
        f" expected {WEIGHTS} (write it with PyTorch: BertModel.from_pretrained(…).save_pretrained(…))"
    )


def weights_hash(folder: str | Path) -> str:
    """sha256 over `config.json` and the weight files, for the key of a cache; of copies it is the same."""
    folder = Path(folder)
    whole = hashlib.sha256()
    for path in [folder / CONFIG, *weight_files(folder)]:
        try:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; expected the folder of a BERT") from None
    return whole.hexdigest()


def read_weights(folder: str | Path, config: BertConfig) -> dict[str, Any]:
    """The params of `Bert(config)`, float32 NumPy arrays, from a folder's safetensors.

    Raises:
      DataError: a file is damaged; or a tensor is missing, is one too many, has another shape or no numbers.
    """
    folder = Path(folder)
    wanted = {tensor.name: tensor for tensor in tensors(config)}
    params: dict[str, Any] = {}
    missing = dict(wanted)
    for path in weight_files(folder):
        for name, raw, value in _read_file(path, wanted):
            if missing.pop(name, None) is None:
                raise DataError(f"{path}: holds {raw} a second time; expected each tensor once")
            _put(params, wanted[name], value)
    if missing:
        raise DataError(
            f"{folder}: its weights lack {next(iter(missing))} and {len(missing) - 1} more tensors; expected those of"
            f" the {config.num_hidden_layers} layers that {CONFIG} tells of"
        )
    return params


def _read_file(path: Path, wanted: dict[str, Tensor]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Plain name, name in the file and float32 value of each tensor of a file that belongs to the encoder."""
    try:
        with safe_open(path, framework="np") as file:
            for raw in sorted(file.keys()):
                name = _plain(raw)
                if name.startswith(LEFT_OUT):
                    continue
                if name not in wanted:
                    raise DataError(f"{path}: holds {raw}; expected a BERT encoder alone, or with {LEFT_OUT}")
                form = file.get_slice(raw)
                _check(path, raw, wanted[name].shape, tuple(form.get_shape()), form.get_dtype())
                value = file.get_tensor(raw).astype(np.float32)
                if not np.isfinite(value).all():
                    raise DataError(f"{path}: {raw} holds NaN or infinity; expected finite numbers")
                yield name, raw, value
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path}: is damaged or no safetensors file ({one_line(error)}); expected a whole one: copy it again"
        ) from None


def _plain(raw: str) -> str:
    """A tensor's name without the prefix, and a norm's as it is called today."""
    name = raw.removeprefix("bert.")
    for old, new in OLD_NAMES.items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name


def _check(path: Path, raw: str, expected: tuple[int, ...], found: tuple[int, ...], dtype: str) -> None:
    if found != expected:
        raise DataError(f"{path}: {raw} has shape {list(found)}; expected {list(expected)} by {CONFIG}")
    if dtype not in FLOATS:
        raise DataError(f"{path}: {raw} is of type {dtype}; expected {', '.join(FLOATS)}")


def _put(params: dict[str, Any], tensor: Tensor, value: np.ndarray) -> None:
    inner = params
    for key in tensor.path[:-1]:
        inner = inner.setdefault(key, {})
    inner[tensor.path[-1]] = np.ascontiguousarray(value.T if tensor.turned else value).reshape(tensor.ours)


def write_weights(folder: str | Path, config: BertConfig, params: Any) -> None:
    """Writes `config.json` and `model.safetensors`, which PyTorch's `BertModel.from_pretrained` reads.

    Each file is there whole or not at all, `config.json` last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {}
    for tensor in tensors(config):
        value: Any = params
        for key in tensor.path:
            value = value[key]
        flat = np.asarray(value, np.float32)
        if tensor.turned:
            flat = flat.reshape(tensor.shape[::-1]).T
        values[tensor.name] = np.ascontiguousarray(flat.reshape(tensor.shape))
    write_whole(folder / WEIGHTS, save(values, metadata={"format": "pt"}))
    write_whole(folder / CONFIG, config.to_json())
