#!/usr/bin/env bash
# The gate: lint, format, types, the wheel, the tests.
#
#   bash launch/test.sh [--slow] [arguments of pytest]
#
# --slow compares with PyTorch. That of PyPI brings gigabytes of CUDA with it; without, where the network allows it:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash launch/test.sh --slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

markers=()
DYNREC_EXTRAS="test,tensorboard"
if [ "${1:-}" = "--slow" ]; then
  markers=(-m "not gpu and not tpu")
  DYNREC_EXTRAS="$DYNREC_EXTRAS,slow"
  shift
fi

. launch/environment.sh

echo "launch: ruff"
ruff check .
ruff format --check .

echo "launch: mypy"
mypy

echo "launch: wheel"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir "$scratch" .
python -m pip install --quiet --disable-pip-version-check --no-deps --target "$scratch/site" "$scratch"/*.whl
# What is shipped is what is imported, every module of it, from a folder that is not the repository.
(cd "$scratch" && JAX_PLATFORMS=cpu PYTHONPATH="$scratch/site" python - "$scratch/site" <<'PYTHON'
import importlib, pathlib, pkgutil, sys

import dynrec_jax

home = pathlib.Path(sys.argv[1]).resolve()
assert pathlib.Path(dynrec_jax.__file__).resolve().is_relative_to(home), dynrec_jax.__file__
for module in pkgutil.walk_packages(dynrec_jax.__path__, "dynrec_jax."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
PYTHON
)

echo "launch: pytest"
# A process a core; a file's tests stay together, so that its fixtures are made once, in the order of tests/conftest.py.
python -m pytest -n auto --dist loadfile --no-loadscope-reorder "${markers[@]}" "$@"
