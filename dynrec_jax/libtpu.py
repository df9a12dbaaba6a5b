"""libtpu, the TPU's runtime and compiler, on machines without a TPU: installed for its compiler alone.

JAX asks it for devices at each start. It then asks a metadata server who it is and tells at length that there is none,
unless these variables say so; and it loads in one process of a machine alone, since TPUs have one owner. What the user
has set stays.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}
CHIPS = ("accel*", "vfio/[0-9]*")  # device files of TPUs, below /dev


def installed() -> bool:
    """Whether it is there to be loaded."""
    return importlib.util.find_spec("libtpu") is not None


def hush_without_chips(devices: Path = Path("/dev")) -> None:
    """Keeps it quiet in this process, where it is installed and there is no chip that it could be for."""
    if installed() and not any(any(devices.glob(pattern)) for pattern in CHIPS):
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps it quiet while it is loaded, chips or not; it reads the variables once, then."""
    added = {name: value for name, value in QUIET.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
