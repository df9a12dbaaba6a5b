"""What is printed of a plan."""

from typing import Any

from rich.console import Console
from rich.table import Table

from dynrec_jax.parallel.exchange import Exchange
from dynrec_jax.train.plan import described

SHOWN = 5  # largest arrays of a program


def show(result: dict[str, Any], console: Console) -> None:
    """A table with a column a program, and the largest arrays of each."""
    programs = columns(result)
    table = Table(title=title(result), caption=result["note"])
    table.add_column("one device")
    for name in programs:
        table.add_column(name, justify="right")
    for name, cells in rows(list(programs.values())):
        table.add_row(name, *cells)
    console.print(table)
    if result["table"]["hops"]:
        console.print(exchange(result["table"]), markup=False)
    for name, numbers in programs.items():
        console.print(f"largest arrays of {name}, beside arguments:")
        for each in numbers["largest_arrays"][:SHOWN]:
            console.print(f"  {size(each['bytes']):>11}  {each['shape']}  {each['op']}", markup=False)
    for name, numbers in programs.items():
        for loop in numbers["loops_counted_once"]:
            console.print(
                f"{name}: how often a loop runs is not known, and it counts once: {loop}", markup=False
            )
        if numbers["reason"]:
            console.print(f"{name}: the compiler says: {numbers['reason']}", markup=False)


def show_search(found: list[dict[str, Any]], console: Console) -> None:
    """What was found to fit, the fastest first, and the flags that set it."""
    if not found:
        console.print("nothing that was tried fits; use more devices, or a shorter data.max_length")
        return
    table = Table(title="what fits, by expected speed")
    for name in ("data", "fsdp", "tensor", "histories a step", "histories/s", "seconds a step", "room"):
        table.add_column(name, justify="right")
    for each in found:
        cells = [str(devices) for devices in each["mesh"].values()]
        cells += [f"{each['batch_size']:,}", f"{each['histories_per_second']:,.0f}"]
        table.add_row(*cells, f"{each['seconds']['expected']:.3g}", size(each["room_bytes"]))
    console.print(table)
    console.print(f"the first: {found[0]['flags']}", markup=False, soft_wrap=True)


def columns(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The numbers of each program by its name."""
    return {
        "train step": {**result, "fits": result["step_fits"]},
        "table part": result["table"],
        "encode": result["score"]["encode"],
        "rank": result["score"]["rank"],
    }


def title(result: dict[str, Any]) -> str:
    """What was compiled for what, and whether it fits."""
    slices = f" in {result['slices']} slices" if result["slices"] > 1 else ""
    devices = f"{result['devices']} device{'s' if result['devices'] > 1 else ''}{slices}"
    sizes = f"{result['items']:,} items, {result['batch_size']:,} histories a step"
    return f"{sizes}, {result['topology']}: {devices}; {'fits' if result['fits'] else 'DOES NOT FIT'}"


def exchange(table: dict[str, Any]) -> str:
    """How devices exchange table rows, in one line."""
    sizes = Exchange(tuple(table["hops"]), tuple(table["capacities"]), table["touched"])
    return f"{described(sizes)}; {table['rounds']:.2f} rounds a step expected for Zipf-1.0 ids"


def rows(programs: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Lines of the table: a name and a cell for each program."""
    lines = [
        ("fits", ["yes" if p["fits"] else "no" for p in programs]),
        ("memory: arguments", [size(p["argument_bytes"]) for p in programs]),
        (
            "memory: other outputs",
            [size(p["output_bytes"] - p["aliased_bytes"]) for p in programs],
        ),
        ("memory: temporary", [size(p["temporary_bytes"]) for p in programs]),
        ("memory: code", [size(p["code_bytes"]) for p in programs]),
        ("memory: at the peak", [size(p["peak_bytes"]) for p in programs]),
        ("memory: room left", [size(p["room_bytes"]) for p in programs]),
        ("products", [scaled(p["flops"], "FLOP") for p in programs]),
        ("memory read and written", [size(p["accessed_bytes"]) for p in programs]),
    ]
    for where in ("within", "between"):
        kinds = sorted({kind for p in programs for kind in p["collective_bytes"][where]})
        for kind in kinds:
            cells = [size(p["collective_bytes"][where].get(kind, 0)) for p in programs]
            lines.append((f"{kind} {where}", cells))
    for name in ("expected", "compute", "memory", "network_within", "network_between"):
        told = f"seconds: {name.replace('_', ' ')}"
        lines.append((told, [f"{p['seconds'][name]:.3g}" for p in programs]))
    return lines


def size(number: float) -> str:
    """Bytes for people: `size(3 * 2**29)` is "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:,.0f} B" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} TiB"


def scaled(number: float, unit: str) -> str:
    """A large number for people: `scaled(2.5e9, "FLOP")` is "2.5 GFLOP"."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 1000:
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000
    return f"{number:.3g} E{unit}"
