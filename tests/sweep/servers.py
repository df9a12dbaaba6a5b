"""A PostgreSQL server for tests, in a folder of its own."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path


def programs() -> Path | None:
    """Where the server's programs are, in Debian's place or on the PATH; None where it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).parent if on_path else None


@contextlib.contextmanager
def postgres(folder: Path, bin: Path) -> Iterator[str]:
    """The address of a server that runs as long as the context; it refuses to run as root, so root lends it a user."""
    user = "postgres" if os.getuid() == 0 else None
    if user is not None:
        entry = pwd.getpwnam(user)
        for path in (folder, *folder.parents):
            if path.stat().st_uid == 0 and path != Path("/") and path.is_relative_to("/tmp"):
                path.chmod(path.stat().st_mode | 0o055)
        os.chown(folder, entry.pw_uid, entry.pw_gid)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    data = folder / "data"

    def run(*command: str) -> None:
        subprocess.run(command, user=user, check=True, capture_output=True, cwd=folder, timeout=60)

    run(str(bin / "initdb"), "-D", str(data), "-U", "dynrec", "-A", "trust", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder} -c fsync=off"
    run(str(bin / "pg_ctl"), "-D", str(data), "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        run(str(bin / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "dynrec", "sweeps")
        yield f"postgresql://dynrec:secret@127.0.0.1:{port}/sweeps"
    finally:
        run(str(bin / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")
