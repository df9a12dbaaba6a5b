"""The knowledge graph beside the events: triples whose heads and tails may be items of the catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa
from ibis.backends.duckdb import Backend

from dynrec_jax.data.catalogue import count
from dynrec_jax.data.dataset import TRIPLES
from dynrec_jax.data.write import write_rows
from dynrec_jax.errors import DataError

COLUMNS = ["head", "relation", "tail"]
MAX_RELATIONS = 10_000


def write_triples(
    con: Backend, folder: Path, raw: ir.Table, items: ir.Table, where: str
) -> tuple[str, dict[str, Any]]:
    """Writes each triple once, by head, relation and tail; gives their hash and what dataset.json says of them.

    Args:
      con: The engine.
      folder: The dataset's folder.
      raw: head, relation and tail.
      items: The catalogue; item_id.
      where: The file, for messages.

    Raises:
      DataError: No triple has an item of the catalogue; so many relations that they are none.
    """
    triples = con.create_table("triples", raw.select(COLUMNS).distinct())
    names = triples.select("relation").distinct().order_by("relation").limit(MAX_RELATIONS + 1)
    relations = names.to_pyarrow()["relation"].to_pylist()
    if len(relations) > MAX_RELATIONS:
        raise DataError(
            f"{where}: more than {MAX_RELATIONS:,} relations, such as {relations[0]!r}; expected a few kinds between "
            "head and tail"
        )
    words = triples.select(word="head").union(triples.select(word="tail")).distinct()
    ids = items.select(word="item_id")
    facts = {
        "count": count(triples),
        "duplicates": count(raw) - count(triples),
        "relations": relations,
        "heads_in_catalogue": count(triples.filter(triples["head"].isin(items["item_id"]))),
        "tails_in_catalogue": count(triples.filter(triples["tail"].isin(items["item_id"]))),
        "items": count(words.semi_join(ids, "word")),
        "entities": count(words.anti_join(ids, "word")),
    }
    if not facts["items"]:
        example = triples.select("head").limit(1).to_pyarrow()["head"][0].as_py()
        raise DataError(
            f"{where}: none of {facts['count']:,} triples has an item of the catalogue as head or tail; heads are "
            f"such as {example!r}; expected item ids as in the log"
        )
    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    return write_rows(
        con, folder / TRIPLES, triples.order_by([ibis._[name] for name in COLUMNS]), schema
    ), facts
