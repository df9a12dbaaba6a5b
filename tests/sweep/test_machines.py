import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynrec_jax.sweep import machines


@pytest.mark.parametrize(("workers", "cores"), [(1, 5), (2, 5), (3, 8), (8, 8), (5, 2)])
def test_cores_are_divided(workers: int, cores: int) -> None:
    given = [machines.cores_of(index, workers, range(10, 10 + cores)) for index in range(workers)]
    assert all(given)
    used = [core for each in given for core in each]
    assert set(used) == set(range(10, 10 + cores))
    if workers <= cores:
        assert len(used) == cores
        assert max(map(len, given)) - min(map(len, given)) <= 1
    else:
        assert all(len(each) == 1 for each in given)


def test_cards_are_divided_and_shared() -> None:
    assert machines.environment_of(0, 1, ["0", "1"], 0) == {}
    two = [machines.environment_of(index, 2, ["4", "7"], 0) for index in range(2)]
    assert two == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "7"}]
    three = [machines.environment_of(index, 3, ["4", "7"], 0) for index in range(3)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in three] == ["4", "7", "4"]
    shares = [float(each.get("XLA_PYTHON_CLIENT_MEM_FRACTION", machines.MEMORY)) for each in three]
    assert shares == [0.45, 0.9, 0.45]
    chips = [machines.environment_of(index, 4, [], 4)["TPU_VISIBLE_CHIPS"] for index in range(4)]
    assert chips == ["0", "1", "2", "3"]
    assert machines.environment_of(1, 2, [], 0) == {}


def test_cards_are_those_that_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\necho "GPU 0: NVIDIA H100 (UUID: a)"; echo "GPU 1: NVIDIA H100 (UUID: b)"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert machines.own_gpus({}) == ["0", "1"]
    assert machines.own_gpus({"CUDA_VISIBLE_DEVICES": "3,5"}) == ["3", "5"]
    assert machines.own_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert machines.own_gpus({"JAX_PLATFORMS": "cpu"}) == []
    assert machines.own_gpus({"JAX_PLATFORMS": "cpu,cuda"}) == []
    assert machines.own_gpus({"JAX_PLATFORMS": "cuda,cpu"}) == ["0", "1"]


PRODUCT = """
import json, os, sys
from dynrec_jax.sweep import machines
if sys.argv[1] != "all":
    machines.keep_to([machines.own_cores()[0]], int(sys.argv[1]))
import jax, jax.numpy as jnp
a = jax.random.normal(jax.random.key(0), (16_384, 24))
product = jax.jit(lambda a: a.T @ a)(a)
print(json.dumps([len(os.sched_getaffinity(0)), product.tolist()]))
"""


def test_on_fewer_cores_the_sums_are_the_same_bit_for_bit() -> None:
    if len(machines.own_cores()) < 2:
        pytest.skip("this machine has one core")

    def made(threads: str) -> list:
        environment = {key: value for key, value in os.environ.items() if key != "NPROC"}
        environment |= {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
        command = [sys.executable, "-c", PRODUCT, threads]
        return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    alone, kept = made("all"), made(str(len(machines.own_cores())))
    assert kept[0] == 1 < alone[0]
    assert kept[1] == alone[1]
