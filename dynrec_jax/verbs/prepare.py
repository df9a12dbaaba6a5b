"""Turns a raw log into a dataset folder: reads, cleans, says what it dropped and why."""

from absl import flags


def define_flags() -> flags.FlagValues:
    """The verb's flags."""
    values = flags.FlagValues()

    def text(name: str, about: str, default: str | None = None) -> None:
        flags.DEFINE_string(name, default, about, flag_values=values)

    def number(name: str, default: int, about: str, low: int = 0, high: int | None = None) -> None:
        flags.DEFINE_integer(name, default, about, lower_bound=low, upper_bound=high, flag_values=values)

    text(
        "source",
        "KIND:PATH of the log. KIND is one of synthetic (synthetic:users=2000,items=1000,seed=0), sequences (a file "
        "with a user a line), atomic (RecBole's .inter or its folder), movielens (a GroupLens folder), amazon (a file "
        "of reviews of 2014, 2018 or 2023, plain or gzip, or its folder; products from meta_* beside it), mind (a "
        "folder with MIND's behaviors.tsv and news.tsv, or with such folders) and table (CSV or Parquet)",
    )
    text("out", "dataset folder to write; must not exist")
    text(
        "items",
        "what describes items, in place of the source's own: CSV, Parquet or JSON lines (plain or gzip) with a column "
        "item_id, a JSON object of item ids and lists, a meta file of Amazon's or GroupLens' movies.dat. Lists of "
        "strings are kept as sets, of real numbers as vectors, all else as text; entities and tags of HTML are taken "
        "out of text. Of several rows of an item the first counts, later ones give what it lacks",
    )
    flags.DEFINE_list(
        "text_columns", [], "columns of the items to keep, as a,b; empty keeps all", flag_values=values
    )
    text(
        "triples",
        "knowledge graph: CSV, TSV or Parquet with the columns head, relation, tail (RecBole's .kg too; three fields "
        "between tabs need no header); heads and tails that are item ids are those items",
    )
    text("user_column", "column of user ids [user]")
    text("item_column", "column of item ids [item]")
    text("time_column", "column of times [time, if it is there]; empty for none")
    text("event_column", "column of event types [event, if it is there]; empty for none")
    text("rating_column", "column of ratings [rating, if it is there]; empty for none")
    number(
        "core",
        0,
        "leave out users and items with fewer events, again and again, until all that stay have them",
    )
    flags.DEFINE_float("min_rating", None, "leave out events rated lower, or not at all", flag_values=values)
    number("min_item_users", 0, "after the core: leave out items with fewer users, once")
    number("min_user_events", 0, "after that: leave out users with fewer events, once")
    flags.DEFINE_enum(
        "missing", "refuse", ["refuse", "drop"], "rows without user, item or time", flag_values=values
    )
    text(
        "ties",
        "order of a user's events at the same time: source, or random:SEED where the source is sorted by item",
        "source",
    )
    text(
        "pseudonymise",
        "file with a secret key of 16 bytes or more: user ids become HMACs before anything is written",
    )
    number("shards", 64, "logical shards", 1, 4096)
    return values


def run(values: flags.FlagValues) -> None:
    """Prepares what the flags say; raises what `prepare` raises."""
    from dynrec_jax.data.clean import Filters
    from dynrec_jax.data.prepare import PrepareOptions, prepare
    from dynrec_jax.data.sources.source import Columns
    from dynrec_jax.errors import ConfigError

    for name, what in (("source", "KIND:PATH of a log"), ("out", "a dataset folder to write")):
        if not values[name].value:
            raise ConfigError(f"--{name} is missing; expected {what}")
    columns = Columns(
        user=values.user_column,
        item=values.item_column,
        time=values.time_column,
        event=values.event_column,
        rating=values.rating_column,
    )
    filters = Filters(
        missing=values.missing,
        min_rating=values.min_rating,
        core=values.core,
        min_item_users=values.min_item_users,
        min_user_events=values.min_user_events,
    )
    prepare(
        PrepareOptions(
            source=values.source,
            out=values.out,
            items=values.items,
            text_columns=tuple(values.text_columns),
            triples=values.triples,
            columns=columns,
            filters=filters,
            ties=values.ties,
            pseudonymise=values.pseudonymise,
            shards=values.shards,
        )
    )
