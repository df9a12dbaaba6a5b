"""Programs in place of those that scripts of launch/ call: each writes down how it was called.

A call is a line of JSON, whatever is in its arguments; what the program does then, a test says.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WRITE = """\
#!{python} -IS
import json, os, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
{body}
"""
SECRET = "canary-5f1c"
# Names that a shell, a manifest or a path could take for something else.
HOSTILE = (
    "a b",
    "it's",
    'say "hi"',
    "a;touch here",
    "$(touch here)",
    "`touch here`",
    "$HOME",
    "$$(HOME)",
    "../../up",
    "--",
    "-n",
    "*",
    "a\\nb\\",
    "line\nbreak",
    "ünïcode 名",
    "#no: comment {a: b}",
    "",
)


class Programs:
    """A folder of such programs, first on the path."""

    def __init__(self, folder: Path):
        self._folder, self._log = folder, folder / "calls.jsonl"
        folder.mkdir()

    def add(self, name: str, body: str = "") -> None:
        """A program; `body` is Python that runs after the call was written down."""
        path = self._folder / name
        path.write_text(WRITE.format(python=sys.executable, log=str(self._log), name=name, body=body))
        path.chmod(0o755)

    def calls(self, name: str | None = None) -> list[list[str]]:
        """Calls so far, with the program's name in front; of one program, or of all."""
        if not self._log.exists():
            return []
        read = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [call for call in read if name in (None, call[0])]

    def environment(self, **more: str) -> dict[str, str]:
        """Of a command that finds these programs, with a secret that nothing may show."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "SLURM_"))}
        return {**kept, "PATH": f"{self._folder}:{kept['PATH']}", "HF_TOKEN": SECRET, **more}

    def run(
        self, command: Sequence[str | Path], cwd: Path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command that finds these programs; standard input is closed."""
        ended = subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert SECRET not in ended.stdout + ended.stderr
        return ended


def activate(folder: Path) -> Path:
    """A file to source in place of making an environment."""
    path = folder / "activate"
    path.write_text("export ACTIVATED=yes\n")
    return path
