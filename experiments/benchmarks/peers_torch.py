"""A lean SASRec in PyTorch, the fair opponent of `peers.py`, which runs it; data lies in ready tensors.

    python peers_torch.py HISTORIES.npz SETTINGS.json RESULT.json

What makes it lean: eager PyTorch's fused causal attention, query, key and value from one product, histories padded on
the right so that no padding mask is needed, softmax over the catalogue at real positions alone (gathered before the
product), the item table shared between input and output, fused Adam. Its feed-forward is one D wide, as SASRec's
(Kang & McAuley 2018) is, which is a quarter of ours. Dropout stands where ours does: behind the embedding, the
attention and the feed-forward.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

USERS_AT_A_TIME = 256  # when scoring, as the others take them


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added: `[B, L, D]` to `[B, L, D]`."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feedforward = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A position sees itself and what came before."""
        qkv = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.out(seen.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.feedforward(self.feedforward_norm(x)))


class SasRec(nn.Module):
    """A Transformer over histories; item i has row i of the table, row 0 is padding."""

    def __init__(self, items: int, settings: dict):
        super().__init__()
        dim = settings["dim"]
        self.table, self.position = nn.Embedding(items + 1, dim), nn.Embedding(settings["length"], dim)
        for embedding in (self.table, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        self.dropout = nn.Dropout(settings["dropout"])
        self.blocks = nn.Sequential(
            *(Block(dim, settings["heads"], settings["dropout"]) for _ in range(settings["layers"]))
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """int64[B, L], padded on the right, to vectors [B, L, D]."""
        x = self.table(items) + self.position.weight[: items.shape[1]]
        return self.norm(self.blocks(self.dropout(x)))


def windows(items: np.ndarray, starts: np.ndarray, ends: np.ndarray, size: int) -> torch.Tensor:
    """int64[U, size], the last `size` events of each history, padded with 0 on the right."""
    at = np.maximum(ends - size, starts)[:, None] + np.arange(size)
    return torch.from_numpy(np.where(at < ends[:, None], items[np.minimum(at, len(items) - 1)], 0))


def train(model: SasRec, rows: torch.Tensor, settings: dict) -> tuple[float, float]:
    """Histories a second over the measured steps, and the last loss; a row has one event more than the model reads."""
    optimizer = torch.optim.Adam(
        model.parameters(), lr=settings["learning_rate"], betas=(0.9, 0.98), fused=True
    )
    batch = min(settings["batch"], len(rows))
    order, began, loss = rows.new_empty(0), 0.0, torch.zeros(())
    for step in range(settings["warm_up"] + settings["measured"]):
        if step == settings["warm_up"]:
            began = time.perf_counter()
        if len(order) < batch:
            order = torch.randperm(len(rows))
        chosen, order = rows[order[:batch]], order[batch:]
        target = chosen[:, 1:]
        real = target != 0
        logits = model(chosen[:, :-1])[real] @ model.table.weight[1:].T
        loss = functional.cross_entropy(logits, target[real] - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return batch * settings["measured"] / (time.perf_counter() - began), loss.item()


def seen_places(items: np.ndarray, starts: np.ndarray, ends: np.ndarray, width: int) -> list[torch.Tensor]:
    """For each batch of users the places, in its flat scores `[B · width]`, of items seen and of padding."""
    places = []
    for first in range(0, len(starts), USERS_AT_A_TIME):
        here = slice(first, first + USERS_AT_A_TIME)
        counts = ends[here] - starts[here]
        row = np.repeat(np.arange(len(counts)), counts)
        flat = row * width + items[starts[first] : starts[first] + counts.sum()]
        places.append(torch.from_numpy(np.concatenate([flat, np.arange(len(counts)) * width])))
    return places


@torch.inference_mode()
def score(model: SasRec, rows: torch.Tensor, places: list[torch.Tensor], k: int) -> tuple[torch.Tensor, ...]:
    """Ids int64[U, k], best first, and their scores."""
    model.eval()
    lists = []
    for items, seen in zip(rows.split(USERS_AT_A_TIME), places, strict=True):
        last = (items != 0).sum(dim=1) - 1
        vectors = model(items)[torch.arange(len(items)), last]
        scores = vectors @ model.table.weight.T
        scores.view(-1).index_fill_(0, seen, -torch.inf)
        lists.append(scores.topk(k))
    return torch.cat([each.indices for each in lists]), torch.cat([each.values for each in lists])


def main(histories: str, settings_file: str, result: str) -> None:
    """Trains, scores everybody, and writes what was measured."""
    settings = json.loads(Path(settings_file).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["cores"])
    torch.manual_seed(0)
    with np.load(histories) as data:
        items, starts, length = data["items"].astype(np.int64), data["starts"], settings["length"]
        train_ends = data["train_ends"]
    starts, ends = starts[:-1], starts[1:]
    able = train_ends - starts >= 2
    trained = windows(items, starts[able], train_ends[able], length + 1)
    model = SasRec(settings["items"], settings)
    training, loss = train(model, trained, settings)
    rows = windows(items, starts, ends, length)
    places = seen_places(items, starts, ends, settings["items"] + 1)
    k = min(settings["k"], settings["items"])
    score(model, rows[:USERS_AT_A_TIME], places[:1], k)  # warm
    began = time.perf_counter()
    ids, _ = score(model, rows, places, k)
    scoring = len(ids) / (time.perf_counter() - began)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    measured = {"training": training, "scoring": scoring, "loss": loss, "versions": versions}
    Path(result).write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
