"""Where verbs keep what can be made again: histories by dataset, and compiled programs."""

from pathlib import Path

import ml_collections

from dynrec_jax.parallel.processes import Processes

CACHE_DIR = "memory-mapped copies of the shards, and compiled programs [~/.cache/dynrec_jax]"
OFF = "off"


def keep_programs(config: ml_collections.ConfigDict, cache_dir: str | None, processes: Processes) -> None:
    """Has this process keep compiled programs: in `compiled` in `cache_dir`, the flag, which goes before the config.

    Without the flag they lie in `config.compiled_dir`; where that is empty, in `compiled` in the config's cache or in
    the user's own. `config.compiled_dir="off"` keeps none, and several processes keep none: JAX lets one of them write,
    and programs of which some are old and some new need not fit each other.
    """
    from dynrec_jax.compiled import keep_compiled
    from dynrec_jax.data.cache import default_cache_dir

    if config.compiled_dir == OFF or processes.count > 1:
        return
    beside = Path(cache_dir or config.data.cache_dir or default_cache_dir()) / "compiled"
    keep_compiled(Path(config.compiled_dir) if config.compiled_dir and not cache_dir else beside)
