"""What a trace of `jax.profiler` and the compiler's text say of a program: which instruction took how much time.

On GPU and TPU instructions lie on lanes of the device and are taken as they lie there. On CPU they do not: XLA starts
many of them on one thread of its pool and has their work done by others, so an instruction's event can be short and
its work long, and events added up are neither the work nor the time. The trace names, for each piece of work that a
thread of the pool takes up, who ordered it (a producer's and a consumer's number), and that is followed here: work
belongs to the instruction that ordered it, be it through other pieces of work. Time is then shared out instant by
instant among all that runs, so the parts and what is idle add up to the time that passed.
"""

import collections
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

INPUT = "benchmark: next batch"  # what the host is said to do while it waits for, and copies, a batch
ORDER, BEGIN, STOP = (f"ThreadpoolListener::{name}" for name in ("Record", "StartRegion", "StopRegion"))
EXECUTOR = "ThunkExecutor::Execute"  # XLA's own work on CPU: starting what is ready
WAITING = f"{EXECUTOR} (wait for completion)"
RUNTIME = ""  # the name of what runs and is no instruction

Span = tuple[float, float]  # nanoseconds


class Instruction(NamedTuple):
    """An instruction of a compiled program.

    Attributes:
      path: scopes and modules that it comes from, as JAX names them; empty where the compiler added it.
      flops: multiplications and additions of its matrix products in one execution.
    """

    path: str
    flops: float


class Usage(NamedTuple):
    """Where the time of the devices went; each number is of one device.

    Attributes:
      seconds: from the first instruction to the end of the last one.
      busy: seconds by instruction; `RUNTIME` stands for what is none.
      calls: executions by instruction, of all devices; of a GPU, its kernels.
      idle: seconds in which nothing ran, or, on CPU, cores had nothing to do.
      waited: seconds of those in which nothing ran and the host was after the next batch.
    """

    seconds: float
    busy: dict[str, float]
    calls: dict[str, int]
    idle: float
    waited: float


# --- the compiler's text ---------------------------------------------------------------------------------------

INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
CONTRACTED = re.compile(r'lhs_contracting_dim\w*"?[=:]\s*[{\[]([\d",\s]*)[}\]]')


def instructions(text: str) -> dict[str, Instruction]:
    """The instructions of a module in XLA's text form, by name.

    Products are counted where the text has them as `dot` or as a call of cuBLAS; a TPU's `convolution` is not.
    """
    shapes: dict[str, list[int]] = {}
    paths: dict[str, str] = {}
    own: dict[str, float] = {}
    called: dict[str, str] = {}
    users: dict[str, list[str]] = collections.defaultdict(list)
    inside: dict[str, float] = collections.defaultdict(float)
    computation = ""
    for line in text.splitlines():
        if line.endswith("{") and " = " not in line:
            computation = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0]
        if not (found := INSTRUCTION.match(line)):
            continue
        name, kind, opcode, rest = found.groups()
        sizes = re.search(r"\[([\d,]*)\]", kind)
        shapes[name] = [int(n) for n in sizes[1].split(",") if n] if sizes else []
        path = re.search(r'op_name="([^"]*)"', rest)
        paths[name] = path[1] if path else ""
        operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
        for operand in operands:
            users[operand].append(name)
        own[name] = _product(opcode, rest, shapes[name], shapes.get(operands[0], []) if operands else [])
        inside[computation] += own[name]
        if opcode == "fusion" and (target := re.search(r"calls=%?([\w.\-]+)", rest)):
            called[name] = target[1]
    return {
        name: Instruction(path or _path_of_user(name, paths, users), own[name] + inside[called.get(name, "")])
        for name, path in paths.items()
    }


def _product(opcode: str, rest: str, out: list[int], left: list[int]) -> float:
    contracted = CONTRACTED.search(rest) if opcode in ("dot", "custom-call") else None
    if not contracted:
        return 0.0
    flops = 2.0
    for size in [*out, *(left[int(axis)] for axis in re.findall(r"\d+", contracted[1]))]:
        flops *= size
    return flops


def _path_of_user(name: str, paths: dict[str, str], users: dict[str, list[str]]) -> str:
    """Copies and the like have no path: they are made for who reads them."""
    seen, queue = {name}, [name]
    while queue and len(seen) < 50:
        for user in users[queue.pop(0)]:
            if paths[user]:
                return paths[user]
            if user not in seen:
                seen.add(user)
                queue.append(user)
    return ""


# --- the trace -------------------------------------------------------------------------------------------------


def read(folder: Path, cores: int) -> Usage:
    """The usage of the devices in the only trace below `folder`; raises RuntimeError where it names no instruction.

    Args:
      folder: as it was given to `jax.profiler.trace`.
      cores: of the machine, on CPU.
    """
    (file,) = folder.rglob("*.xplane.pb")
    usage = summarise(jax.profiler.ProfileData.from_file(str(file)).planes, cores)
    if not usage.busy:
        raise RuntimeError(f"{file}: the trace names no instruction that ran")
    return usage


def summarise(planes: Iterable[Any], cores: int) -> Usage:
    """`read`, of planes with `name` and `lines`, lines with `name` and `events`."""
    planes = list(planes)
    host = [line for plane in planes if plane.name.startswith("/host:CPU") for line in plane.lines]
    waits = [
        (e.start_ns, e.start_ns + e.duration_ns) for line in host for e in line.events if e.name == INPUT
    ]
    devices = [
        [line for line in plane.lines if _is_lane(line.name)] for plane in planes if _is_device(plane.name)
    ]
    devices = [lanes for lanes in devices if any(True for line in lanes for _ in line.events)]
    calls: collections.Counter[str] = collections.Counter()
    if devices:
        work = [[piece for line in lanes for piece in _lane(line.events, calls)] for lanes in devices]
        usages = [_share(pieces, 1, waits) for pieces in work]
    else:
        usages = [_share(_pool(host, calls), cores, waits)]
    busy: dict[str, float] = collections.defaultdict(float)
    for usage in usages:
        for name, seconds in usage.busy.items():
            busy[name] += seconds / len(usages)
    mean = [
        sum(values) / len(usages)
        for values in zip(*((u.seconds, u.idle, u.waited) for u in usages), strict=True)
    ]
    return Usage(mean[0], dict(busy), dict(calls), mean[1], mean[2])


def _is_device(plane: str) -> bool:
    return plane.startswith(("/device:GPU", "/device:TPU"))


def _is_lane(line: str) -> bool:
    """Streams of a GPU; of a TPU the line of instructions, beside which others say the same in other units."""
    return line.startswith("Stream") or line == "XLA Ops"


class _Piece(NamedTuple):
    name: str
    start: float
    end: float


def _name(event: Any, stats: dict[str, Any]) -> str:
    """Of an instruction: a GPU's and a CPU's events carry it, a TPU's are called by its text."""
    return stats.get("hlo_op") or event.name.split(" = ")[0].lstrip("%")


def _lane(events: Iterable[Any], calls: collections.Counter[str]) -> list[_Piece]:
    """Pieces of time by the innermost instruction."""
    edges = []
    for number, event in enumerate(events):
        stats = dict(event.stats)
        name = _name(event, stats)
        calls[name] += 1
        edges += [(event.start_ns, 1, -event.duration_ns, number, name)]
        edges += [(event.start_ns + event.duration_ns, 0, 0, number, name)]
    pieces, stack, before = [], [], 0.0
    for at, begins, _, number, name in sorted(edges):
        if stack:
            pieces.append(_Piece(stack[-1][1], before, at))
        before = at
        if begins:
            stack.append((number, name))
        else:
            stack.remove((number, name))
    return pieces


def _pool(lines: Iterable[Any], calls: collections.Counter[str]) -> list[_Piece]:
    """Pieces of time of the host's threads, by the instruction that ordered the work."""
    orders: dict[int, Any] = {}  # the number of an order: who gave it
    pieces = []
    for line in lines:
        edges = []
        for number, event in enumerate(line.events):
            at, name = event.start_ns, event.name
            if name in (EXECUTOR, WAITING):
                edges += [
                    (at, 2, -event.duration_ns, number, name),
                    (at + event.duration_ns, 1, 0, number, name),
                ]
                continue
            stats = dict(event.stats)
            if name == ORDER:
                edges.append((at, 3, 0, number, stats["_p"]))
            elif name == BEGIN:
                edges.append((at, 2, -1e30, number, stats["_c"]))
            elif name == STOP:
                edges.append((at, 0, 0, number, None))
            elif "hlo_op" in stats:
                calls[stats["hlo_op"]] += 1
                edges += [
                    (at, 2, -event.duration_ns, number, name),
                    (at + event.duration_ns, 1, 0, number, name),
                ]
        pieces += _thread(sorted(edges, key=lambda edge: edge[:4]), orders)

    def orderer(who: Any) -> str | None:
        while isinstance(who, int):
            who = orders.get(who, RUNTIME)
        return {EXECUTOR: RUNTIME, WAITING: None}.get(who, who)

    named = ((orderer(who), start, end) for who, start, end in pieces)
    return [_Piece(who, start, end) for who, start, end in named if who is not None]


def _thread(
    edges: list[tuple[float, int, float, int, Any]], orders: dict[int, Any]
) -> list[tuple[Any, float, float]]:
    """Pieces of one thread by the innermost that runs there: an event's name, or the number of an order."""
    pieces, stack, before = [], [], 0.0
    for at, kind, _, number, what in edges:
        if stack and at > before:
            pieces.append((stack[-1][1], before, at))
        before = at
        if kind == 3:
            orders[what] = stack[-1][1] if stack else RUNTIME
        elif kind == 2:
            stack.append((number, what))
        elif kind == 1:
            stack.remove((number, what))
        elif regions := [each for each in stack if isinstance(each[1], int)]:
            stack.remove(regions[-1])
    return pieces


def _share(pieces: list[_Piece], lanes: int, waits: list[Span]) -> Usage:
    """Shares each instant out among what runs; of `lanes`, those with nothing to do are idle."""
    edges = sorted([(p.start, 1, p.name) for p in pieces] + [(p.end, -1, p.name) for p in pieces])
    busy: dict[str, float] = collections.defaultdict(float)
    running: collections.Counter[str] = collections.Counter()
    number, idle, waited, before = 0, 0.0, 0.0, edges[0][0] if edges else 0.0
    for at, change, name in edges:
        if (passed := at - before) > 0:
            for each, count in running.items():
                busy[each] += passed * count / max(number, lanes) / 1e9
            idle += passed * max(lanes - number, 0) / lanes / 1e9
            if not number:
                waited += sum(max(0.0, min(end, at) - max(start, before)) for start, end in waits) / 1e9
        before = at
        number += change
        running[name] += change
        if not running[name]:
            del running[name]
    seconds = (edges[-1][0] - edges[0][0]) / 1e9 if edges else 0.0
    return Usage(seconds, busy, {}, idle, waited)
