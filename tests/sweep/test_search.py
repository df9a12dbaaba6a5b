"""The search of experiments/sweeps/search.py against every config of its grid."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]


def run(folder: Path, *arguments: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_DISABLE_MOST")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
    }
    command = [sys.executable, "-m", "dynrec_jax", *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=3000)


@pytest.mark.slow
def test_tpe_with_hyperband_finds_what_the_grid_finds_in_a_third_of_its_steps(tmp_path: Path) -> None:
    run(tmp_path, "prepare", "--source=synthetic:users=600,items=300,seed=0", "--out=data/synthetic")
    best, steps = {}, {}
    for kind, workers in (("grid", 2), ("search", 1)):
        config = f"--config={ROOT}/experiments/sweeps/search.py:{kind}"
        cache = f"--cache_dir={tmp_path / 'cache'}"
        run(tmp_path, "sweep", config, f"--workdir=sweeps/{kind}", f"--workers={workers}", cache)
        rows = pq.read_table(tmp_path / "sweeps" / kind / "sweep.parquet").to_pylist()
        best[kind] = max(row["ndcg@10"] for row in rows if row["state"] == "complete")
        steps[kind] = 0
        for row in rows:
            lines = (tmp_path / "sweeps" / kind / row["folder"] / "metrics.jsonl").read_text().splitlines()
            steps[kind] += max(json.loads(line)["step"] for line in lines)
    assert len(list((tmp_path / "sweeps/grid/trials").iterdir())) == 64
    assert best["search"] >= 0.99 * best["grid"], (best, steps)
    assert steps["search"] <= steps["grid"] / 3, (best, steps)
