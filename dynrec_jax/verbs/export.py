"""A run as a folder that recommends without this package: a program that jax alone runs, weights, ids and a runner.

`recommend.stablehlo` is user encoder, item vectors and ABRA's list in one, of any batch size; `run.py` beside it asks
it for users' histories. With the format faiss, `items.faiss` holds the items to be searched by users' vectors.
"""

from pathlib import Path

from absl import flags

from dynrec_jax.errors import ConfigError
from dynrec_jax.parallel.processes import ALONE
from dynrec_jax.verbs.caches import CACHE_DIR, keep_programs
from dynrec_jax.verbs.evaluate import parse_step
from dynrec_jax.verbs.telling import teller


def define_flags() -> flags.FlagValues:
    """The verb's flags."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "run folder", flag_values=values)
    flags.DEFINE_string("out", None, "folder to write, which is not there yet", flag_values=values)
    flags.DEFINE_integer(
        "k", None, "length of the lists [100, or the whole catalogue]", lower_bound=1, flag_values=values
    )
    flags.DEFINE_boolean("filter_seen", False, "leave out items of the history", flag_values=values)
    flags.DEFINE_list("formats", ["stablehlo"], "any of stablehlo, faiss", flag_values=values)
    flags.DEFINE_list(
        "platforms",
        ["cpu", "cuda", "tpu"],
        "that the program runs on, any of cpu, cuda, rocm, tpu",
        flag_values=values,
    )
    flags.DEFINE_string(
        "faiss", "Flat", "FAISS's index: Flat is exact; or IVF256,Flat, HNSW32 and so on", flag_values=values
    )
    flags.DEFINE_string("faiss_search", "", "how the index is searched, as nprobe=8", flag_values=values)
    flags.DEFINE_string("step", "best", "checkpoint: best, last or a step", flag_values=values)
    flags.DEFINE_string("dataset", None, "where the dataset folder lies now, if it moved", flag_values=values)
    flags.DEFINE_string("cache_dir", None, CACHE_DIR, flag_values=values)
    return values


def run(values: flags.FlagValues) -> None:
    """Exports; prints what was written."""
    for name, what in (("workdir", "a run folder made by `dynrec train`"), ("out", "a folder to write")):
        if not values[name].value:
            raise ConfigError(f"--{name} is missing; expected {what}")
    from dynrec_jax import workdir as workdirs
    from dynrec_jax.evaluate.evaluator import LIST_LENGTH
    from dynrec_jax.export.folder import ExportOptions, check, export

    step, workdir, out = parse_step(values.step), Path(values.workdir), Path(values.out)
    options = ExportOptions(
        k=LIST_LENGTH if values.k is None else values.k,
        filter_seen=values.filter_seen,
        formats=tuple(values.formats),
        platforms=tuple(values.platforms),
        factory=values.faiss,
        search=values.faiss_search,
        cache_dir=values.cache_dir or "",
    )
    check(options, out)
    keep_programs(workdirs.open_config(workdir), values.cache_dir, ALONE)
    opened = workdirs.open(workdir, step, values.dataset, say=teller(ALONE))
    if values.k is None:
        options = options.shortened(opened.items.number)
    manifest = export(opened, out, options, print)
    size = sum(file["bytes"] for file in manifest["files"].values())
    what = f"step {manifest['step']} of {workdir}, {manifest['items']:,} items, lists of {manifest['k']}"
    print(f"{what}: {size / 1e6:,.1f} MB in {out}")
    if "recommend" in manifest["programs"]:
        print(f"python {out / 'run.py'} --histories=FILE: a user a line, with jax alone")
