"""Ranks the catalogue with FAISS' exact flat index, for `peers.py`: python peers_faiss.py VECTORS SETTINGS RESULT.

VECTORS is an .npz with `users` float32[U, D], in batches' order, and `items` float32[N, D]; as many users at a time as
dynrec has in a batch, and all at once; each as often as dynrec's ranking is repeated, and the faster median counts.
"""

import importlib.metadata
import json
import statistics
import sys
import time
from pathlib import Path

import faiss
import numpy as np

REPEATED = 5  # as RANKED in peers_dynrec.py


def main(vectors: str, settings_file: str, result: str) -> None:
    """Searches, and writes users a second."""
    settings = json.loads(Path(settings_file).read_text(encoding="utf-8"))
    faiss.omp_set_num_threads(settings["cores"])
    with np.load(vectors) as data:
        users, items, batch = data["users"], data["items"], int(data["batch"])
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items)
    index.search(users[:batch], settings["k"])  # warm
    rates = {}
    for name, size in (("in batches", batch), ("at once", len(users))):
        seconds = []
        for _ in range(REPEATED):
            began = time.perf_counter()
            for start in range(0, len(users), size):
                index.search(users[start : start + size], settings["k"])
            seconds.append(time.perf_counter() - began)
        rates[name] = len(users) / statistics.median(seconds)
    versions = {name: importlib.metadata.version(name) for name in ("faiss-cpu", "numpy")}
    measured = {"ranking": max(rates.values()), "rates": rates, "versions": versions}
    Path(result).write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
