"""Loops whose number of rounds is known at run time alone, recognised by the named scope that they stand in."""

import re
from collections.abc import Callable, Collection, Mapping

from dynrec_jax.compile.hlo import Instruction, Module


def direct_scope(path: str, scopes: Collection[str]) -> str | None:
    """The scope that a loop stands in without another loop in between.

    Args:
      path: of the loop in the traced program, such as "jit(f)/transpose(jvp(softmax))/shard_map/while".
      scopes: names that are looked for.
    """
    for part in reversed(path.split("/")[:-1]):
        if part in ("while", "scan", "body"):
            return None
        for scope in scopes:
            if re.search(rf"(?<!\w){re.escape(scope)}(?!\w)", part):
                return scope
    return None


def expected_trips(trips: Mapping[str, float]) -> Callable[[Instruction, Module], float]:
    """How often a loop of a compiled program is expected to run, by its scope; once where none is known."""

    def of(loop: Instruction, module: Module) -> float:
        return trips.get(direct_scope(loop_path(loop, module), trips) or "", 1.0)

    return of


def loop_path(loop: Instruction, module: Module) -> str:
    """Where in the traced program a loop comes from; empty where the compiler says it nowhere."""
    if loop.op_name:
        return loop.op_name
    # The compiler rewrote the loop and dropped its name; what decides on the next round still has one.
    condition = module.computations[loop.called["condition"][0]]
    paths = [each.op_name for each in condition.instructions.values() if "/while/cond" in each.op_name]
    return paths[-1].rpartition("/cond")[0] if paths else ""
