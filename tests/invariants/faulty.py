"""`dynrec` with a fault in it: python -m tests.invariants.faulty PHASE KIND PROCESS VERB FLAGS.

PHASE is where the fault comes: data, step, evaluation, save, commit, restore, log or compile. KIND is what it is:
raise (an error), stop (SIGSTOP), spin (it never comes back) or slow (it takes SLOW seconds, and goes on). The other
processes than PROCESS have no fault.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

AT = 3  # the call of that number meets it, where there are many
SLOW = 25.0
Fault = Callable[[], None]


def fault(kind: str) -> Fault:
    """What happens."""

    def happen() -> None:
        sys.stderr.write(f"fault: {time.time()}\n")
        sys.stderr.flush()
        if kind == "raise":
            raise RuntimeError("the fault")
        if kind == "stop":
            time.sleep(1.5)  # what it does is told once a second
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(SLOW if kind == "slow" else 3_600)

    return happen


def before(owner: Any, name: str, happen: Fault, at: int) -> None:
    """Has the fault come before a function's call of a number."""
    real, calls = getattr(owner, name), iter(range(1_000_000))

    def faulty(*arguments: Any, **named: Any) -> Any:
        if next(calls) == at:
            happen()
        return real(*arguments, **named)

    setattr(owner, name, faulty)


def plant(phase: str, happen: Fault) -> None:
    """Puts the fault where it belongs."""
    from dynrec_jax.evaluate.evaluator import Evaluator
    from dynrec_jax.train import loop, metrics_writer
    from dynrec_jax.train.saving import Save
    from dynrec_jax.train.step import CompiledStep
    from dynrec_jax.train.verified import Reader

    if phase == "data":
        real = loop.batches

        def batches(*arguments: Any) -> Any:
            for number, batch in enumerate(real(*arguments)):
                if number == AT:
                    happen()
                yield batch

        loop.batches = batches
    elif phase == "compile":
        from jax._src import compiler

        before(compiler, "backend_compile_and_load", happen, 0)
    else:
        owner, name, at = {
            "step": (CompiledStep, "__call__", AT),
            "evaluation": (Evaluator, "metrics", 0),
            "save": (Save, "write", 0),
            "commit": (Save, "commit", 0),
            "restore": (Reader, "read", 0),
            "log": (metrics_writer.MetricsWriter, "write", AT),
        }[phase]
        before(owner, name, happen, at)


def main() -> None:
    """Plants the fault and runs the command."""
    from dynrec_jax import cli

    phase, kind, process, *arguments = sys.argv[1:]
    if process == os.environ.get("JAX_PROCESS_ID", "0"):
        plant(phase, fault(kind))
    sys.argv = ["dynrec", *arguments]
    sys.exit(cli.main(arguments) if "JAX_PROCESS_ID" not in os.environ else cli.main())


if __name__ == "__main__":
    main()
