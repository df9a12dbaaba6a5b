"""SASRec in PyTorch, the fair opponent of `peers.py`, which runs it; data lies in ready tensors.

    python peers_torch.py HISTORIES.npz SETTINGS.json RESULT.json

The network: eager PyTorch's fused causal attention, query, key and value from one product, histories padded on the
right so that no padding mask is needed, the item table shared between input and output, fused Adam. Its feed-forward
is one D wide, as SASRec's (Kang & McAuley 2018) is. Dropout stands where ours does: behind the embedding, the attention
and the feed-forward. The softmax over the catalogue is computed at real positions alone, gathered before the product.

`tuned` in the settings adds what makes it faster still on CPU (ms a step on two cores, of MovieLens-1M,
measured in one run, 2026-11-24): the softmax's loss and gradient together by blocks of positions, so that positions ×
catalogue never lies in memory (1,164 to 517); dropout's mask from a byte of random bits an element, in place of a
serial Bernoulli draw (423); a batch in groups of similar length, each padded to its own longest (328 with 8 groups).
Without `tuned`, `functional.cross_entropy`, `nn.Dropout` and the batch as a whole, as most write it. `torch.compile`
was tried on the tuned one: no faster than eager (440 ms and 400), behind 43 s of compilation.
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
GROUPS = 8  # of similar length in a batch; 4 and 16 are slower
POSITIONS_AT_A_TIME = 1024  # that the catalogue's softmax is computed for; 512 and 4,096 are no faster


class ByteDropout(nn.Module):
    """Dropout whose probability is a multiple of 1/256: a byte of random bits decides on an element."""

    def __init__(self, rate: float):
        super().__init__()
        self.below = round(rate * 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` where the module does not train."""
        if not self.training:
            return x
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self.below
        return x * kept.to(x.dtype).mul_(256 / (256 - self.below))


class SoftmaxLoss(torch.autograd.Function):
    """Mean cross-entropy over the catalogue; the gradient comes with the loss, a block of positions at a time."""

    @staticmethod
    def forward(ctx, vectors: torch.Tensor, table: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Vectors [P, D], table [N, D] and targets int64[P] to a scalar."""
        vectors_grad, table_grad = torch.empty_like(vectors), torch.zeros_like(table)
        loss = vectors.new_zeros(())
        for first in range(0, len(vectors), POSITIONS_AT_A_TIME):
            here = slice(first, first + POSITIONS_AT_A_TIME)
            block, right = vectors[here], target[here]
            at = torch.arange(len(right))
            scores = block @ table.T
            scores -= scores.amax(dim=1, keepdim=True)
            right_scores = scores[at, right]
            total = scores.exp_().sum(dim=1)
            loss += (total.log() - right_scores).sum()
            scores /= total[:, None]
            scores[at, right] -= 1
            torch.mm(scores, table, out=vectors_grad[here])
            table_grad.addmm_(scores.T, block)
        ctx.save_for_backward(vectors_grad.div_(len(vectors)), table_grad.div_(len(vectors)))
        return loss / len(vectors)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scales what `forward` kept."""
        vectors_grad, table_grad = ctx.saved_tensors
        return vectors_grad * gradient, table_grad * gradient, None


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added: `[B, L, D]` to `[B, L, D]`."""

    def __init__(self, dim: int, heads: int, dropout: nn.Module):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feedforward = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.dropout = dropout

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
        self.dropout = (ByteDropout if settings["tuned"] else nn.Dropout)(settings["dropout"])
        self.blocks = nn.Sequential(
            *(Block(dim, settings["heads"], self.dropout) for _ in range(settings["layers"]))
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


def plain_loss(model: SasRec, windows: torch.Tensor) -> torch.Tensor:
    """Mean over the targets of windows int64[B, L + 1]."""
    target = windows[:, 1:]
    real = target != 0
    logits = model(windows[:, :-1])[real] @ model.table.weight[1:].T
    return functional.cross_entropy(logits, target[real] - 1)


def tuned_loss(model: SasRec, windows: torch.Tensor) -> torch.Tensor:
    """`plain_loss`, by groups of similar length and by blocks of positions."""
    lengths = (windows != 0).sum(dim=1)
    vectors, targets = [], []
    for group in windows[lengths.argsort()].chunk(GROUPS):
        group = group[:, : int((group != 0).sum(dim=1).max())]
        target = group[:, 1:].flatten()
        at = target.nonzero().squeeze(1)
        vectors.append(model(group[:, :-1]).flatten(0, 1)[at])
        targets.append(target[at] - 1)
    return SoftmaxLoss.apply(torch.cat(vectors), model.table.weight[1:], torch.cat(targets))


def train(model: SasRec, rows: torch.Tensor, settings: dict) -> tuple[float, float]:
    """Histories a second over the measured steps, and the last loss; a row has one event more than the model reads."""
    optimizer = torch.optim.Adam(
        model.parameters(), lr=settings["learning_rate"], betas=(0.9, 0.98), fused=True
    )
    loss_of = tuned_loss if settings["tuned"] else plain_loss
    batch = min(settings["batch"], len(rows))
    order, began, loss = rows.new_empty(0), 0.0, torch.zeros(())
    for step in range(settings["warm_up"] + settings["measured"]):
        if step == settings["warm_up"]:
            began = time.perf_counter()
        if len(order) < batch:
            order = torch.randperm(len(rows))
        chosen, order = rows[order[:batch]], order[batch:]
        loss = loss_of(model, chosen)
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
        at = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - starts[here], counts)
        places.append(
            torch.from_numpy(np.concatenate([row * width + items[at], np.arange(len(counts)) * width]))
        )
    return places


@torch.inference_mode()
def score(model: SasRec, rows: torch.Tensor, places: list[torch.Tensor], k: int) -> tuple[torch.Tensor, ...]:
    """Ids int64[U, k], best first, and their scores."""
    model.eval()
    lists = []
    for items, seen in zip(rows.split(USERS_AT_A_TIME), places, strict=True):
        last = (items != 0).sum(dim=1) - 1
        vectors = model(items[:, : int(last.max()) + 1])[torch.arange(len(items)), last]
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
    if settings["tuned"]:  # users of similar length together
        order = np.argsort(ends - starts)
        starts, ends = starts[order], ends[order]
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
