"""One dataset whose items are described in every way, and the job of reading its towers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynrec_jax.data.dataset import Dataset
from dynrec_jax.models.towers.tower import Job

from ... import described, tiny

# Items come in the order of their ids: a, b, … f are the items 1 … 6. e and f have nothing that tells.
ITEMS: list[dict[str, Any]] = [
    {"item_id": "a", "title": "red lamp", "more": "of glass", "genres": "x, y", "tags": ["s", "t"], "v": [1.0, 2.0]},
    {"item_id": "b", "title": "blue lamp", "genres": "y ,z,y", "tags": ["t"], "v": [3.0, 0.0]},
    {"item_id": "c", "title": "red chair", "more": "of wood", "genres": "x,", "v": [-1.0, 1.0]},
    {"item_id": "d", "more": "blue glass", "genres": "x, y", "tags": ["s", "u"], "numbers": [1, 2]},
    {"item_id": "e", "v": [0.0, 0.0]},
    {"item_id": "f", "one": [1.5]},
]  # fmt: skip
LOG = ["u1 a b c d e f", "u2 f e d c", "u3 a c e"]
# red and lamp have two neighbours each, glass one; d is related to a.
TRIPLES = (
    "a\tcolour\tred\nb\tkind\tlamp\na\tkind\tlamp\nc\tcolour\tred\na\tmade\tglass\nd\tlike\ta\nb\tlike\ta\n"
)


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return described.dataset(tmp_path_factory.mktemp("shop") / "made", LOG, ITEMS, TRIPLES)


@pytest.fixture(scope="session")
def job(shop: Dataset) -> Callable[..., Job]:
    """A job by its config keys, and perhaps its items."""

    def make(items: Any = None, folder: Path | None = None, **keys: Any) -> Job:
        keys = {"item__fusion": "text", **keys}
        return Job(tiny.config(**keys), shop, shop.items_table() if items is None else items, folder)

    return make


@pytest.fixture
def bert(tmp_path: Path) -> Iterator[Path]:
    return described.bert_folder(tmp_path / "bert", ["red lamp of glass", "blue chair of wood"])
