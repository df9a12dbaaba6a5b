"""`mind:FOLDER`: the news log MIND: `behaviors.tsv` and `news.tsv`, or a folder of such folders (train, dev).

A line of behaviors is an impression: when a user saw which news, what was clicked (`N12-1`) and what was not (`N9-0`),
and what the user had clicked before the log began. Clicks become events of type `click`; what was not clicked is left
out. The clicks before the log have an order but no times: they are events of type `history` at the time of the user's
first impression, ahead of it. So no time is invented, no event passes a cut in time that its user's first impression
does not, and a model can tell by the type which times are not their own. Later lines repeat the history: it is taken
from the user's first line, by time, alone. What was clicked several times before the log counts once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dynrec_jax.data.arrow import numbers
from dynrec_jax.data.kinds import SET, TEXT
from dynrec_jax.data.sources.columns import refuse_columns
from dynrec_jax.data.sources.described import load_described, set_of
from dynrec_jax.data.sources.lines import field_blocks, require_file
from dynrec_jax.data.sources.source import Job, Source, finish, raw_schema
from dynrec_jax.errors import DataError

TEST = re.compile(r"(^|[^a-z])test$")  # MINDlarge_test, and not `latest`
BEHAVIORS, NEWS = "behaviors.tsv", "news.tsv"
BEHAVIOR_FIELDS, NEWS_FIELDS = 5, 8
TIME_FORMAT = "%m/%d/%Y %I:%M:%S %p"
ITEMS = {"title": TEXT, "abstract": TEXT, "categories": SET}
CLICK, HISTORY = "click", "history"
# A place is the file's number, the line and the position in it; positions of clicks come after those of the history.
FILE_SHIFT, LINE_SHIFT, CLICKS = 56, 20, 1 << 19
LINE_MASK = (1 << (FILE_SHIFT - LINE_SHIFT)) - 1


def read(job: Job) -> Source:
    """Reads MIND's log and its news. Times are taken as UTC.

    Raises:
      DataError: Not a folder, a file missing; a time that is none, an impression without a label.
      ConfigError: A column was named: they are known; the event column may be left out.
    """
    columns = replace(job.columns, event=None) if job.columns.event == "" else job.columns
    refuse_columns(columns, "mind")
    folder = Path(job.path)
    folders = parts(folder)
    behaviors = [require_file(part / BEHAVIORS, "MIND's behaviors") for part in folders]
    news = [require_file(part / NEWS, "MIND's news") for part in folders] if job.own_items else []
    schema = raw_schema(times=True, events=job.columns.event is None, ratings=False)

    return finish(
        job,
        f"mind:{folder.resolve().name}",
        schema,
        events(behaviors, schema),
        lambda place: where(behaviors, place),
        time_unit="seconds",
        items=load_news(job, news) if news else None,
        ordered_ties=True,
    )


def where(paths: list[Path], place: int) -> str:
    """A place as file:line."""
    return f"{paths[place >> FILE_SHIFT]}:{place >> LINE_SHIFT & LINE_MASK}"


def parts(folder: Path) -> list[Path]:
    """The folder itself, or those in it that hold a log; a test split is none, it tells no clicks."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {found}; expected a folder with {BEHAVIORS} and {NEWS}")
    if (folder / BEHAVIORS).is_file():
        return [folder]
    inner = [path.parent for path in sorted(folder.glob(f"*/{BEHAVIORS}"))]
    logs = [path for path in inner if not TEST.search(path.name.lower())]
    if not logs:
        raise DataError(
            f"{folder}: no {BEHAVIORS}, neither in it nor in its folders; expected MIND as unpacked"
        )
    return logs


def rows(paths: list[Path]) -> Iterator[tuple[np.ndarray, np.ndarray, pa.Array, pa.Array, pa.Array]]:
    """Yields places of lines, seconds, users, histories and impressions, a block at a time.

    Raises:
      DataError: A time that is none.
    """
    for number, path in enumerate(paths):
        for lines, (_, user, time, history, seen) in field_blocks(path, "\t", BEHAVIOR_FIELDS):
            line_N = numbers(lines)
            seconds = pc.strptime(time, format=TIME_FORMAT, unit="s", error_is_null=True)
            if (bad := pc.index(pc.is_null(seconds), True).as_py()) >= 0:
                raise DataError(
                    f"{path}:{line_N[bad]}: time {time[bad].as_py()!r}; expected as in 11/15/2019 9:55:12 AM"
                )
            place_N = (line_N << LINE_SHIFT) + (number << FILE_SHIFT)
            yield place_N, numbers(seconds.cast(pa.int64())), user, history, seen


def events(paths: list[Path], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Every user's history, once, and the clicks."""
    # In memory: one number pair a user.
    first: dict[str, tuple[int, int]] = {}
    for place_N, time_N, user, _, _ in rows(paths):
        for name, *found in zip(user.to_pylist(), time_N.tolist(), place_N.tolist(), strict=True):
            if name not in first or (found[0], found[1]) < first[name]:
                first[name] = (found[0], found[1])
    for place_N, time_N, user, history, seen in rows(paths):
        is_first = [
            first[name][1] == place for name, place in zip(user.to_pylist(), place_N.tolist(), strict=True)
        ]
        row_N, item = words(pc.if_else(pa.array(is_first), history, ""))
        yield batch(schema, HISTORY, row_N, item, place_N, time_N, user)
        row_N, item = clicks(seen, paths, place_N)
        yield batch(schema, CLICK, row_N, item, place_N + CLICKS, time_N, user)


def words(texts: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """The words of texts, with the text's index for each."""
    cut = pc.ascii_split_whitespace(texts)
    flat = pc.list_flatten(cut)
    real = pc.not_equal(flat, "")
    return numbers(pc.list_parent_indices(cut).filter(real)), flat.filter(real)


def clicks(seen: pa.Array, paths: list[Path], place_N: np.ndarray) -> tuple[np.ndarray, pa.Array]:
    """The news of impressions that were clicked, with the impression's index for each."""
    row_N, word = words(seen)
    clicked = pc.ends_with(word, "-1")
    labelled = pc.or_(clicked, pc.ends_with(word, "-0"))
    if (bad := pc.index(labelled, False).as_py()) >= 0:
        raise DataError(
            f"{where(paths, place_N[row_N[bad]])}: impression {word[bad].as_py()!r} has no label; "
            "expected as in N12-1 for a click or N12-0 for none (a test split tells none)"
        )
    return row_N[pc.filter(pa.array(np.arange(len(row_N))), clicked).to_numpy()], pc.utf8_slice_codeunits(
        word.filter(clicked), 0, -2
    )


def batch(
    schema: pa.Schema,
    kind: str,
    row_N: np.ndarray,
    item: pa.Array,
    place_N: np.ndarray,
    time_N: np.ndarray,
    user: pa.Array,
) -> pa.RecordBatch:
    """Events of one kind; their places count on from their line's."""
    starts = np.searchsorted(row_N, row_N)
    columns = {
        "user": user.take(pa.array(row_N)),
        "item": item,
        "time": pa.array(time_N[row_N]).cast(pa.string()),
        "event": pa.array(np.full(len(row_N), kind), pa.string()),
        "place": pa.array(place_N[row_N] + np.arange(len(row_N)) - starts),
    }
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def load_news(job: Job, paths: list[Path]) -> ir.Table:
    """Title, abstract, and category and subcategory as a set; entities are left out."""

    def batches() -> Iterator[tuple[list[pa.Array], pa.Array]]:
        for number, path in enumerate(paths):
            for lines, fields in field_blocks(path, "\t", NEWS_FIELDS):
                item, category, subcategory, title, abstract, *_ = fields
                pairs = zip(category.to_pylist(), subcategory.to_pylist(), strict=True)
                sets = pa.array([set_of(list(pair)) for pair in pairs], pa.list_(pa.string()))
                yield [item, title, abstract, sets], pc.add(lines, number << FILE_SHIFT)

    return load_described(job.con, "raw_items", ITEMS, batches(), str(paths[0]))
