"""What `peers.py` has dynrec do in processes of its own.

python peers_dynrec.py score FLAGS       `dynrec score FLAGS` twice; its seconds into the file that STOPWATCH names
python peers_dynrec.py rank RUN VECTORS K    the ranking alone; users' and items' vectors into VECTORS, for FAISS
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

STOPWATCH = "DYNREC_BENCHMARK_STOPWATCH"  # as in peers.py
RANKED = 5  # times that the ranking is repeated; the median counts


def score_under_stopwatch() -> int:
    """`dynrec score` twice, the second time under a stopwatch: the first compiles, and the peers are warm too."""
    from dynrec_jax import allocator, cli

    allocator.restart_with_kept_memory()  # as the console script begins; this script starts again
    from dynrec_jax.score import job, several

    # Both calls have one recommender, and so one set of compiled programs; nothing else of the first is kept.
    make, made = several.Recommender, []

    def once(*settings: Any) -> Any:
        if not made:
            made.append(make(*settings))
        return made[0]

    several.Recommender = once

    def watched(run: Any, out: Path, *others: Any) -> dict[str, int]:
        began = time.perf_counter()
        score(run, out.with_name("warm"), *others)
        cold, began = time.perf_counter() - began, time.perf_counter()
        done = score(run, out, *others)
        found = {"users": done["users"], "seconds": time.perf_counter() - began, "first_seconds": cold}
        Path(os.environ[STOPWATCH]).write_text(json.dumps(found), encoding="utf-8")
        return done

    score, job.score = job.score, watched
    return cli.main()


def rank(workdir: str, vectors: str, k: int) -> int:
    """Times the ranking of a run's batches, and keeps what was ranked for FAISS."""
    from dynrec_jax import allocator

    allocator.restart_with_kept_memory()
    import jax

    from dynrec_jax import workdir as workdirs
    from dynrec_jax.data.cache import Histories
    from dynrec_jax.evaluate.recommender import Recommender

    opened = workdirs.open(workdir, "last")
    stored = Histories(opened.dataset, opened.config.data.cache_dir)
    batch = opened.config.evaluation.batch_size
    made = Recommender(opened.model, opened.mesh, batch, k, False, items=opened.items)
    make = made.prepare_vectors(opened.params, opened.tables)
    users = make(stored, np.arange(stored.users), stored.lengths)
    _, table = made.vectors(opened.params, opened.tables)
    # As the encoder would give them: the scale comes with the ranking.
    batches = np.split(users / opened.model.abra.scale, range(batch, len(users), batch))[:-1]
    reads = [(jax.device_put(u), jax.numpy.zeros((batch, 1), np.int32)) for u in batches]
    seen = jax.numpy.zeros((batch, 1), np.int32)

    def all_of_them() -> float:
        began = time.perf_counter()
        found = None
        for read in reads:
            next_ = made._rank(read, table, seen)
            if found is not None:
                _ = np.asarray(found[0]), np.asarray(found[1])
            found = next_
        assert found is not None
        _ = np.asarray(found[0]), np.asarray(found[1])
        return time.perf_counter() - began

    with jax.set_mesh(opened.mesh):
        all_of_them()  # compiles
        seconds = statistics.median(all_of_them() for _ in range(RANKED))
    np.savez(
        vectors,
        users=np.concatenate(batches),
        items=np.asarray(table)[1 : opened.items.number + 1],
        batch=batch,
        rate=len(reads) * batch / seconds,
    )
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        sys.exit(rank(sys.argv[2], sys.argv[3], int(sys.argv[4])))
    sys.exit(score_under_stopwatch())
