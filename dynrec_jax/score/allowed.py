"""Which items may be recommended: files of ids, and a rule on the items' columns."""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dynrec_jax.data.new_items import read_new_items
from dynrec_jax.errors import ConfigError, DataError, one_line
from dynrec_jax.evaluate.only import Offered
from dynrec_jax.score.files import read_columns
from dynrec_jax.workdir import Run

ITEM = ("item_id", "item")


def allowed_items(
    run: Run, allow: Path | None, deny: Path | None, where: str
) -> tuple[np.ndarray | None, list[str]]:
    """bool[N + 1], which items may be in a list, and what the user should know; None where all may.

    Args:
      run: whose items they are, those that came after training included.
      allow: a file of ids, and no others may.
      deny: a file of ids that may not.
      where: a rule, as `keeping`.

    Raises:
      DataError: a file is not what it must be, or names no item that is known.
      ConfigError: the rule cannot be understood, or no item is left.
    """
    if allow is None and deny is None and not where:
        return None, []
    allowed, notes = np.ones(run.items.number + 1, bool), []
    allowed[0] = False
    for path, wanted in ((allow, True), (deny, False)):
        if path is not None:
            named, unknown = _named(run, path)
            allowed &= named if wanted else ~named
            if unknown:
                notes.append(f"{unknown:,} items of {path} are unknown")
    if where:
        allowed[1:] &= keeping(items_of(run), where)
    left = int(allowed.sum())
    if not left:
        raise ConfigError("--allow, --deny and --where leave no item; expected one at least")
    return allowed, [*notes, f"{left:,} of {run.items.number:,} items may be recommended"]


def items_of(run: Run) -> pa.Table:
    """The items' columns, without their index; new items behind the dataset's.

    Of these the model reads some columns alone, and a rule may be on any: they are read once more.

    Raises:
      DataError: a column of the file of new items is of another kind than the dataset's.
    """
    table = run.dataset.items_table()
    if run.new is not None:
        new = run.new
        if new.path is not None:
            new = read_new_items(new.path, run.dataset, set(table.column_names[2:]))
        table = pa.concat_tables([table, new.table.cast(table.schema)])
    return table.drop_columns(["index"]) if "index" in table.column_names else table


def keeping(items: pa.Table, where: str) -> np.ndarray:
    """bool[N], of which items a rule is true; where it is null, it is not.

    The rule is one boolean expression of SQL over the columns of `items`, run by DuckDB, which can open no file and no
    connection while it runs, and whose settings are locked.

    Raises:
      ConfigError: it is no such expression.
    """
    columns = ", ".join(items.column_names)
    if not where.strip():
        raise ConfigError(f"--where: is empty; expected a rule on the columns {columns}")
    con = duckdb.connect(":memory:", config={"autoinstall_known_extensions": "false"})
    try:
        con.register("items", items)
        con.execute("CREATE TABLE known AS SELECT * FROM items")
        con.unregister("items")
        for setting in (
            "autoload_known_extensions = false",
            "python_enable_replacements = false",
            "enable_external_access = false",
            "lock_configuration = true",
        ):
            con.execute(f"SET {setting}")
        rule = duckdb.SQLExpression(where)
        found = con.table("known").select(rule.alias("kept"))
        if len(found.types) != 1:
            raise ConfigError(f"--where={where}: expected one expression on the columns {columns}")
        if str(found.types[0]) != "BOOLEAN":
            raise ConfigError(
                f"--where={where}: is {found.types[0]}; expected what is true or false of the columns {columns}"
            )
        kept = found.to_arrow_table().column("kept").combine_chunks()
        if len(kept) != items.num_rows:
            raise ConfigError(
                f"--where={where}: expected what is true or false of each item, of the columns {columns}"
            )
    except duckdb.Error as error:
        raise ConfigError(
            f"--where={where}: {_reason(error)}; the items have the columns {columns}"
        ) from None
    finally:
        con.close()
    return pc.fill_null(kept, False).to_numpy(zero_copy_only=False)


def _reason(error: duckdb.Error) -> str:
    """DuckDB's first sentence, without the kind of the error and without hints."""
    _, _, text = str(error).partition("Error: ")
    text = (text or str(error)).split("\n")[0]
    return one_line(Exception(text)).rstrip(".!")


def _named(run: Run, path: Path) -> tuple[np.ndarray, int]:
    """bool[N + 1], which items a file names; and how many ids it has that no item has."""
    table = read_columns(path, {"item_id": ITEM})
    ids = table.column("item_id")
    index = pc.index_in(ids, run.item_ids)
    known = index.drop_null().to_numpy()
    if not len(known):
        raise DataError(
            f"{path}: none of its {len(ids):,} items is in the catalogue (the first is {ids[0].as_py()!r})"
        )
    named = np.zeros(run.items.number + 1, bool)
    named[known + 1] = True
    return named, index.null_count


def offered_to(
    run: Run, path: Path, users_U: np.ndarray, ids_U: pa.Array, allowed: np.ndarray | None
) -> tuple[Offered, list[str]]:
    """What each of some users is offered, by a file with a row for each user and item, or with a list a user.

    Args:
      run: whose items they are.
      path: columns `user_id` and `item_id`, or `user_id` and the lists `item_ids`.
      users_U: int64, numbers of the users.
      ids_U: their ids.
      allowed: bool[N + 1], as `allowed_items` gives it.

    Raises:
      DataError: the file is not what it must be, or offers nobody anything.
    """
    table = read_columns(path, {"user_id": ("user_id", "user"), "item_id": (*ITEM, "item_ids", "items")})
    user = pc.index_in(table.column("user_id"), ids_U)
    item = pc.index_in(table.column("item_id"), run.item_ids)
    there = pc.and_(user.is_valid(), item.is_valid()).to_numpy(zero_copy_only=False)
    user_E = users_U[user.fill_null(0).to_numpy()[there]]
    item_E = item.fill_null(0).to_numpy()[there].astype(np.int64) + 1
    if allowed is not None:
        kept = allowed[item_E]
        user_E, item_E = user_E[kept], item_E[kept]
    if not len(user_E):
        raise DataError(f"{path}: offers none of these users an item that may be recommended")
    items = run.items.number + 1
    pair_E = np.unique(user_E * items + item_E)  # in the order of users and items, each once
    counts = np.bincount(pair_E // items, minlength=int(users_U.max()) + 1)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    unknown = int(item.null_count)
    notes = [f"{unknown:,} rows of {path} name unknown items"] if unknown else []
    without = int((counts[users_U] == 0).sum())
    if without:
        notes.append(f"{without:,} users whom {path} offers nothing left out")
    return Offered((pair_E % items).astype(np.int32), starts), notes
