"""A run on a log that is awkward on purpose: repeated items, ids that look like numbers or like nothing."""

import random
from pathlib import Path

import pytest

from ..commands import Made, dynrec, make

ITEMS = ["007", "7", "NA", "null", *(f"i{number:02d}" for number in range(12))]
USERS = ["001", "1", "42", "NA", "null", *(f"u{number:02d}" for number in range(25))]


def log() -> dict[str, list[str]]:
    """Histories by user, in which a third of the events repeat an earlier one.

    User 42 has taken all items but three; u00 and u01 are too short to be asked.
    """
    rng = random.Random(3)
    histories = {}
    for user in USERS:
        history: list[str] = []
        for _ in range({"u00": 1, "u01": 2}.get(user, rng.randrange(3, 16))):
            history.append(rng.choice(history) if history and rng.random() < 0.3 else rng.choice(ITEMS))
        histories[user] = history
    histories["42"] = sorted(ITEMS)[:-3]
    return histories


@pytest.fixture(scope="session")
def histories() -> dict[str, list[str]]:
    return log()


@pytest.fixture(scope="session")
def shop(tmp_path_factory, histories) -> Made:
    """A run on `log`, prepared from a file of sequences."""
    folder = tmp_path_factory.mktemp("shop")
    lines = [" ".join([user, *items]) for user, items in histories.items()]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    return make(folder, f"sequences:{folder / 'log.txt'}")


@pytest.fixture(scope="session")
def lists(shop, tmp_path_factory) -> Path:
    """The first five items for every user, from the whole history."""
    out = tmp_path_factory.mktemp("lists") / "out"
    assert dynrec("score", workdir=shop.workdir, out=out, k=5) == 0
    return out
