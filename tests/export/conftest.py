"""One exported folder for all tests of the runner; they read it, or break a copy of it."""

from pathlib import Path

import pytest

from dynrec_jax.data.dataset import Dataset

from .runs import exported, untrained


@pytest.fixture(scope="session")
def folder(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model over 25 items, lists of six without items that were seen."""
    return exported(untrained(tiny_dataset), tmp_path_factory.mktemp("export") / "out", filter_seen=True)
