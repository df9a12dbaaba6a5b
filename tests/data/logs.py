"""Small logs for tests, and what plain Python makes of them."""

import random
from pathlib import Path

from rich.console import Console

from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.prepare import PrepareOptions, prepare


def write_csv(path: Path, rows: list[tuple], header: str = "user,item,time,event,rating") -> str:
    """Writes rows; gives the source that names them."""
    names = ",".join(header.split(",")[: len(rows[0])])
    lines = [names, *(",".join("" if value is None else str(value) for value in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return f"table:{path}"


def made(
    tmp_path: Path, rows: list[tuple], name: str = "out", console: Console | None = None, **options
) -> Dataset:
    source = write_csv(tmp_path / f"{name}.csv", rows)
    return prepare(PrepareOptions(source=source, out=tmp_path / name, **{"shards": 3, **options}), console)


def some_rows(seed: int, users: int = 23, items: int = 17, count: int = 300) -> list[tuple]:
    """user, item, time, event, rating; ids with letters outside of ASCII, many equal times."""
    rng = random.Random(seed)
    return [
        (
            f"ü{rng.randrange(users)}",
            f"{rng.choice('aÄ𐌀')}{rng.randrange(items)}",
            1_000_000_000 + rng.randrange(40),
            rng.choice(["view", "buy", "cart"]),
            rng.randrange(1, 6),
        )
        for _ in range(count)
    ]


def expected(rows: list[tuple]) -> dict[str, list[tuple]]:
    """Histories of rows (user, item, time, event, rating): duplicates out, by time, then as in the file."""
    kinds = {name: i for i, name in enumerate(sorted({row[3] for row in rows}), 1)}
    found: dict[str, list[tuple]] = {}
    for user, item, time, event, _ in sorted(dict.fromkeys(rows), key=lambda row: row[2]):
        found.setdefault(user, []).append((item, time, kinds[event]))
    return found
