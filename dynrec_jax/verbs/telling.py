"""How a verb tells of long work that has no progress of its own."""

import sys
from collections.abc import Callable

from dynrec_jax.parallel.processes import Processes


def teller(processes: Processes) -> Callable[[str], None]:
    """Writes lines to standard error; of several processes, the first one does."""

    def say(line: str) -> None:
        if processes.first:
            print(line, file=sys.stderr, flush=True)

    return say
