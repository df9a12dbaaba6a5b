"""What a scoring job is asked for."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynrec_jax.evaluate.compressed import Compression

LISTS, USERS, ITEMS, BOTH, NEIGHBOURS = "lists", "users", "items", "both", "neighbours"
WHAT = (LISTS, USERS, ITEMS, BOTH, NEIGHBOURS)
SPLITS = ("all", "test", "validation")

POOL = 500  # candidates of a user from whom lists are made anew


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """What to score.

    Attributes:
      k: length of the lists.
      filter_seen: whether items of the history are left out.
      split: "all" recommends from the whole history, "test" and "validation" from what evaluation sees.
      users: a CSV or Parquet file of user ids or of new histories; None for all users.
      cache_dir: memory-mapped copies of the shards; empty for the run's own setting.
      at: when the recommendations are asked for, in seconds since 1970, of a model that looks at it; None for `until`
        where that is given, and otherwise for the time of the log's last event, or the file's, or of evaluation's
        targets.
      until: histories are read up to this moment, which is not in them, in seconds since 1970; None for all of them.
      what: "lists" for users; vectors of "users", of "items", or of "both"; or "neighbours", a list for each item.
      file_format: of the parts, one of `formats.FORMATS`.
      allow: a file of the only items that may be in a list.
      deny: a file of items that may not.
      where: a rule on the items' columns, that those in a list keep; SQL's syntax.
      candidates: a file of the items that each user is offered, and no others.
      min_score: items whose score is lower are left out.
      hops: how often the mixture refines the query; None as the run was trained.
      diversify: λ of `rerank.diversified`, 0 to 1; 0 for none. One of the two alone.
      calibrate: λ of `rerank.calibrated`, 0 to 1; 0 for none.
      pool: from how many candidates of a user lists are then made, or the whole catalogue where it has fewer.
      compression: how the runs are compressed; None for the runs as they are. Where their tables are compressed, those
        of the runs are deleted.
      shares: of each run's scores, which are summed; empty for their mean.
    """

    k: int = 100
    filter_seen: bool = False
    split: str = "all"
    users: Path | None = None
    cache_dir: str = ""
    at: int | None = None
    until: int | None = None
    what: str = LISTS
    file_format: str = "parquet"
    allow: Path | None = None
    deny: Path | None = None
    where: str = ""
    candidates: Path | None = None
    min_score: float | None = None
    hops: int | None = None
    diversify: float = 0.0
    calibrate: float = 0.0
    pool: int = POOL
    compression: "Compression | None" = None
    shares: tuple[float, ...] = ()

    def told(self) -> dict[str, Any]:
        """What of it is unlike the default and changes what is written, for the manifest; files are not told here."""
        always, elsewhere = (
            ("k", "filter_seen", "split"),
            ("users", "allow", "deny", "candidates", "cache_dir"),
        )
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in always or (value != field.default and field.name not in elsewhere):
                found[field.name] = list(value) if isinstance(value, tuple) else value
        if self.compression is not None:
            found["compressed"] = dataclasses.asdict(self.compression)
            del found["compression"]
        return found
