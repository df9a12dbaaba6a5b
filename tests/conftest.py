"""Set before JAX starts: CPU alone, eight simulated devices, no silent rank promotion, nothing cached."""

import gc
import io
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.prepare import PrepareOptions, prepare

PLATFORM = os.environ.get("DYNREC_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = PLATFORM
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
if PLATFORM == "cpu":
    # Tiny programs that run once: they are compiled quickly, not well, which takes half the time and less.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    # The way of making loops that XLA had before takes two thirds of the time. An XLA without it ends at once when it
    # is asked for it: it is asked in a process of its own, by the first one of the tests' alone.
    QUICK = "--xla_cpu_use_fusion_emitters=false"
    if "PYTEST_XDIST_WORKER" not in os.environ and QUICK not in os.environ.get("XLA_FLAGS", ""):
        asked = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()}
        known = subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"], env=asked, capture_output=True
        )
        if known.returncode == 0:
            os.environ["XLA_FLAGS"] = asked["XLA_FLAGS"]
# Tracing leaves much garbage, and to look for it often takes a tenth of the time.
gc.set_threshold(100_000, 50, 50)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


PEAK = 1e12
LONG = ("invariants", "sweep")  # folders of long tests, which begin first: none is waited for at the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Brings the files of long tests to the front."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)


@pytest.fixture(scope="session", autouse=True)
def given_peak() -> Iterator[float]:
    """Operations a second that the host is said to make: nothing is measured in tests."""
    from dynrec_jax.train import peak  # here, because JAX starts with it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peak, "measured", lambda: PEAK)
        yield PEAK


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets that lies beside the repository, where there is one."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is absent: tests on real data are left out")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Sequences without times: 41 users of 1 to 30 events over 25 items, 4 shards."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = random.Random(0)
    lines = [
        " ".join([f"u{user}", *(f"i{rng.randrange(25):02d}" for _ in range(1 + user * 29 // 40))])
        for user in range(41)
    ]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    options = PrepareOptions(source=f"sequences:{folder / 'log.txt'}", out=folder / "dataset", shards=4)
    return prepare(options, Console(file=io.StringIO()))


@pytest.fixture(scope="session")
def timed_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A log with times (one a minute) and event types: 20 users, 12 items, 300 events, 4 shards."""
    folder = tmp_path_factory.mktemp("timed")
    rng = random.Random(1)
    rows = [
        f"u{rng.randrange(20)},i{rng.randrange(12):02d},{1_600_000_000 + 60 * n},{rng.choice(['view', 'buy'])}"
        for n in range(300)
    ]
    (folder / "log.csv").write_text("\n".join(["user,item,time,event", *rows]) + "\n")
    options = PrepareOptions(source=f"table:{folder / 'log.csv'}", out=folder / "dataset", shards=4)
    return prepare(options, Console(file=io.StringIO()))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests keep memory-mapped histories: never the user's own cache."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def histories(tiny_dataset: Dataset, cache_dir: Path) -> Histories:
    """All shards of `tiny_dataset`, mapped."""
    return Histories(tiny_dataset, cache_dir)
