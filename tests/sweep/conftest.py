import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sweep.bench import Bench
from tests.sweep.servers import postgres, programs


@pytest.fixture(scope="session")
def postgres_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a PostgreSQL server that this session has started."""
    found = programs()
    if found is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt install postgresql)")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed (pip install 'dynrec-jax[postgres]')")
    with postgres(tmp_path_factory.mktemp("postgres"), found) as address:
        yield address


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)
