"""The sizes of a BERT, read from and written as Hugging Face's `config.json`; no tensor is opened."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from dynrec_jax.errors import DataError, one_line

CONFIG = "config.json"
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
# What old files do not say: the values that Hugging Face's own BertConfig takes then.
UNSAID: dict[str, Any] = {
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "pad_token_id": 0,
}
# What makes another network of the same tensors.
ENCODER = {
    "model_type": "bert",
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT, by the names of `config.json`.

    Attributes:
      vocab_size: token ids, 0 to `vocab_size - 1`.
      hidden_size: D.
      num_hidden_layers: layers.
      num_attention_heads: H, which divides D.
      intermediate_size: F of the feed-forward.
      max_position_embeddings: tokens of the longest text.
      type_vocab_size: kinds of token, of which texts alone have the first.
      layer_norm_eps: added to the variance.
      hidden_act: one of ACTIVATIONS; "gelu" is that by the error function.
      hidden_dropout_prob: the checkpoint's rate, kept for the file alone.
      attention_probs_dropout_prob: the same for attention's weights.
      pad_token_id: the token that texts are filled up with.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = UNSAID["type_vocab_size"]
    layer_norm_eps: float = UNSAID["layer_norm_eps"]
    hidden_act: str = UNSAID["hidden_act"]
    hidden_dropout_prob: float = UNSAID["hidden_dropout_prob"]
    attention_probs_dropout_prob: float = UNSAID["attention_probs_dropout_prob"]
    pad_token_id: int = UNSAID["pad_token_id"]

    def to_json(self) -> str:
        """The text of a `config.json` that Hugging Face's BertModel reads."""
        return (
            json.dumps({"architectures": ["BertModel"], **ENCODER, **dataclasses.asdict(self)}, indent=2)
            + "\n"
        )


def read_config(folder: str | Path) -> BertConfig:
    """The sizes of the BERT in a folder; cheap, and the tensors are not looked at.

    Raises:
      DataError: there is no such folder or `config.json`, it is damaged, or says that this is no BERT encoder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; expected a Hugging Face BERT ({CONFIG} and *.safetensors)"
        )
    path = folder / CONFIG
    found = read_object(path, "the sizes of a BERT")
    for key, expected in ENCODER.items():
        if found.get(key, expected) != expected:
            raise DataError(f"{path}: {key} is {found[key]!r}; expected {expected!r}, a BERT encoder")
    return _checked(path, found)


def read_object(path: Path, what: str) -> dict[str, Any]:
    """A file's JSON object, or a DataError that says what it was to hold."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected JSON with {what}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: is no JSON ({one_line(error)}); expected {what}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds a JSON {type(found).__name__}; expected an object with {what}")
    return found


def _checked(path: Path, found: dict[str, Any]) -> BertConfig:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(BertConfig):
        value = found.get(field.name)
        if value is None:
            if field.name not in UNSAID:
                raise DataError(f"{path}: has no {field.name}; expected the sizes of a BERT")
            value = UNSAID[field.name]
        values[field.name] = _value(path, field.name, value)
    config = BertConfig(**values)
    if config.hidden_size % config.num_attention_heads:
        raise DataError(
            f"{path}: num_attention_heads {config.num_attention_heads} does not divide hidden_size"
            f" {config.hidden_size}; expected heads of equal size"
        )
    if config.pad_token_id >= config.vocab_size:
        raise DataError(
            f"{path}: pad_token_id is {config.pad_token_id}; expected less than vocab_size {config.vocab_size}"
        )
    return config


def _value(path: Path, key: str, value: Any) -> Any:
    if key == "hidden_act":
        if value not in ACTIVATIONS:
            raise DataError(f"{path}: hidden_act is {value!r}; expected one of {', '.join(ACTIVATIONS)}")
        return value
    if key in ("layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob"):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < 1 or (key == "layer_norm_eps" and value == 0):
            raise DataError(f"{path}: {key} is {value!r}; expected a number from 0 to 1, and epsilon above 0")
        return float(value)
    least = 0 if key == "pad_token_id" else 1
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise DataError(f"{path}: {key} is {value!r}; expected a whole number of at least {least}")
    return value
