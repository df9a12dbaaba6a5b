"""Recommends with a folder that `dynrec export` wrote. It needs jax and nothing else: `pip install jax`.

    python run.py --histories=users.jsonl --out=lists.jsonl

Reads a user a line, oldest event first; `times` are seconds since 1970, `at` is when the list is asked for:

    {"user_id": "7", "item_ids": ["31", "1029"], "times": [964982703, 964982931], "events": ["view", "buy"], "at": …}

`times`, `events` and `at` count where the model looks at them (export.json: `inputs`). Without `at`, a list is asked
for when the log ended that the model was trained on, or with the user's last event if that is later. Writes a user a
line, best item first: `{"user_id": "7", "item_ids": [...], "scores": [...]}`. Events of items that the model does not
know, and users without any other, are left out and counted on standard error.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.export
import numpy as np

FORMAT = 1
MANIFEST, WEIGHTS, ITEMS = "export.json", "weights.safetensors", "item_ids.json"
DTYPES = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4")}
MOST_HEADER = 100_000_000  # bytes, as safetensors itself has it
# What `export.json` must have, besides what it says of files.
EXPECTED = {
    **dict.fromkeys(("files", "programs"), dict),
    **dict.fromkeys(("weights", "platforms", "event_types"), list),
    **dict.fromkeys(("max_length", "interests", "log_began", "log_ended"), int),
}
LATEST = 10**11  # of times in seconds: larger numbers are milliseconds or finer
FEWEST_SEEN, SEEN_FACTOR = 16, 4  # widths of seen items, so that few programs are compiled


class Fault(Exception):
    """What is wrong with the folder, the input or a flag, in one line."""


def read_manifest(folder: Path, files: Iterable[str]) -> dict[str, Any]:
    """`export.json`, after the files have been held against its checksums.

    Raises:
      Fault: the folder is not what `dynrec export` wrote.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Fault(f"{folder}: not a folder of `dynrec export` ({error!r})") from None
    if found != FORMAT:
        raise Fault(f"{folder}: has format {found}; this runner reads {FORMAT}, use the run.py beside it")
    for key, kind in EXPECTED.items():
        if not isinstance(manifest.get(key), kind):
            raise Fault(f"{folder / MANIFEST}: is damaged ({key} is no {kind.__name__}); copy it again")
    for name in files:
        if name not in manifest["files"]:
            raise Fault(
                f"{folder}: holds no {name}; --query asks for vectors, of a folder of --formats=faiss, and all else "
                "for lists, of one of --formats=stablehlo"
            )
        expected = manifest["files"][name]["sha256"]
        try:
            with (folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise Fault(
                f"{folder / name}: not readable ({error.strerror}); copy the whole folder again"
            ) from None
        if digest != expected:
            raise Fault(
                f"{folder / name}: is damaged (sha256 {digest[:12]}, expected {str(expected)[:12]}); copy it again"
            )
    return dict(manifest)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, mapped: an 8-byte length, a JSON header, and numbers without a gap.

    Raises:
      Fault: the file is not that.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
        length = int.from_bytes(data[:8].tobytes(), "little")
        if not 2 <= length <= min(MOST_HEADER, len(data) - 8):
            raise ValueError(f"a header of {length} bytes in a file of {len(data)}")
        header = json.loads(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        body, arrays, end = data[8 + length :], {}, 0
        for name, entry in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
            kind, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            whole = all(type(size) is int and size >= 0 for size in [*shape, start, stop])
            if (
                not whole
                or start != end
                or stop - start != math.prod(shape) * kind.itemsize
                or stop > len(body)
            ):
                raise ValueError(f"{name} of shape {shape} at {start} to {stop}")
            arrays[name], end = body[start:stop].view(kind).reshape(shape), stop
        if end != len(body):
            raise ValueError(f"{len(body) - end} bytes behind the last array")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Fault(f"{path}: not readable as safetensors ({error})") from None
    return arrays


def read_program(
    code: bytes, about: dict[str, Any], weights: list[dict[str, Any]], platforms: list[str]
) -> Any:
    """A program that was exported, as a function of (weights, inputs), both by name.

    The file holds StableHLO alone, which jax reads by itself; jax's own container needs one more package. All that the
    container would say is in the manifest: a function of the same arguments is exported, and its code replaced.
    """
    version = about["calling_convention"]
    oldest = jax.export.minimum_supported_calling_convention_version
    newest = jax.export.maximum_supported_calling_convention_version
    if not oldest <= version <= newest:
        raise Fault(
            f"the program's calling convention is {version}; jax {jax.__version__} reads {oldest} to {newest}"
        )
    scope = jax.export.SymbolicScope()

    def shapes(entries: list[dict[str, Any]]) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            entry["name"]: jax.ShapeDtypeStruct(
                jax.export.symbolic_shape(",".join(map(str, entry["shape"])), scope=scope), entry["dtype"]
            )
            for entry in entries
        }

    def same_arguments(weights: dict[str, jax.Array], inputs: dict[str, jax.Array]) -> list[jax.Array]:
        sizes = {"b": inputs["items"].shape[0]}
        return [
            jax.numpy.zeros([sizes.get(size, size) for size in entry["shape"]], entry["dtype"])
            for entry in about["outputs"]
        ]

    stand_in = jax.export.export(jax.jit(same_arguments, keep_unused=True), platforms=platforms)(
        shapes(weights), shapes(about["inputs"])
    )
    program = dataclasses.replace(stand_in, mlir_module_serialized=code, calling_convention_version=version)
    return jax.jit(program.call)


class Runner:
    """A folder that `dynrec export` wrote, ready to be asked.

    Attributes:
      manifest: `export.json`.
      unknown_items: events that were left out so far, of items that the model does not know.
      empty_users: users that were left out so far, without a known item.
    """

    def __init__(self, folder: Path, program: str = "recommend"):
        """`program` is "recommend", or "query" where it was exported for an index.

        Raises:
          Fault: the folder is damaged, or was exported for other devices.
        """
        try:
            self._read_folder(folder, program)
        except (KeyError, TypeError, AttributeError) as error:
            raise Fault(f"{folder / MANIFEST}: is damaged ({error!r}); copy it again") from None
        self._items = json.loads((folder / ITEMS).read_text(encoding="utf-8"))
        self._index = {item: i for i, item in enumerate(self._items, 1)}
        self._types = {name: i for i, name in enumerate(self.manifest["event_types"], 1)}
        self.unknown_items = self.empty_users = 0

    def _read_folder(self, folder: Path, program: str) -> None:
        file = f"{program}.stablehlo"
        self.manifest = read_manifest(folder, [file, WEIGHTS, ITEMS])
        about = self.manifest["programs"][program]
        self._inputs = {entry["name"] for entry in about["inputs"]}
        platforms = self.manifest["platforms"]
        here = jax.default_backend()
        if not {"gpu": {"cuda", "rocm"}}.get(here, {here}) & set(platforms):
            raise Fault(f"{folder}: was exported for {', '.join(platforms)}, and jax runs on {here} here")
        weights = read_safetensors(folder / WEIGHTS)
        for entry in self.manifest["weights"]:
            found = weights.get(entry["name"])
            if found is None or (list(found.shape), found.dtype.name) != (entry["shape"], entry["dtype"]):
                raise Fault(
                    f"{folder / WEIGHTS}: {entry['name']} is missing, or not {entry['dtype']}{entry['shape']}"
                )
        self._weights = jax.device_put(
            {entry["name"]: weights[entry["name"]] for entry in self.manifest["weights"]}
        )
        self._call = read_program((folder / file).read_bytes(), about, self.manifest["weights"], platforms)

    def run(
        self, users: Iterable[dict[str, Any]], batch_size: int = 256, at: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """What is to be written of each user that has a known item, in the order of the users.

        Args:
          users: as the lines that the module's docstring shows.
          batch_size: users that are computed together.
          at: when all lists are asked for that do not say it themselves, in seconds since 1970.

        Raises:
          Fault: a user is not what is expected, or a score is not a number.
        """
        before: tuple[list[str], Any] | None = None
        size = 0
        for some in _batches(self._known(users, at), batch_size):
            # The last batch is as large as the others, so that no further program is compiled for it.
            size = max(size, len(some))
            made = (
                [str(user["user_id"]) for user in some],
                self._call(self._weights, self._arrays(some, size)),
            )
            if before is not None:  # the device goes on with this batch while the one before it is written
                yield from self._told(*before)
            before = made
        if before is not None:
            yield from self._told(*before)

    def _known(self, users: Iterable[dict[str, Any]], at: int | None) -> Iterator[dict[str, Any]]:
        """Users with numbers in place of names, from the first event on; those without an event are left out."""
        for number, user in enumerate(users, 1):
            try:
                known = self._read(user, at)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise Fault(
                    f"user number {number}: {error if str(error) else 'is not as expected'}"
                ) from None
            if known["items"]:
                yield known
            else:
                self.empty_users += 1

    def _read(self, user: dict[str, Any], at: int | None) -> dict[str, Any]:
        name, ids = user.get("user_id"), user.get("item_ids")
        if not isinstance(name, str | int) or not isinstance(ids, list):
            raise ValueError("expected user_id and a list item_ids")
        times, events = user.get("times"), user.get("events")
        for what, given in (("times", times), ("events", events)):
            if given is not None and (not isinstance(given, list) or len(given) != len(ids)):
                raise ValueError(f"expected a list {what} as long as item_ids")
        if times is None and "times" in self._inputs:
            raise ValueError("the model looks at times; expected a list times, in seconds since 1970")
        index = [self._index.get(str(item), 0) for item in ids]
        known = [place for place, item in enumerate(index) if item]
        self.unknown_items += len(index) - len(known)
        types = [0] * len(ids) if events is None else [self._types.get(name, 0) for name in events]
        seconds, asked = [0] * len(ids), 0
        if times is not None and "times" in self._inputs:
            seconds = [self._seconds(time) for time in times]
            if seconds != sorted(seconds):
                raise ValueError("times go back; expected the oldest event first")
        if "asked" in self._inputs:
            given = at if user.get("at") is None else user["at"]
            asked = max([self.manifest["log_ended"], *seconds]) if given is None else self._seconds(given)
        return {
            "user_id": name,
            "items": [index[place] for place in known],
            "times": [seconds[place] for place in known],
            "events": [types[place] for place in known],
            "asked": asked,
        }

    def _seconds(self, time: Any) -> int:
        """Seconds since the first event of the log that the model was trained on."""
        if not isinstance(time, int | float) or abs(time) >= LATEST:
            raise ValueError(f"time {time!r} is no number of seconds since 1970")
        return min(max(math.floor(time) - self.manifest["log_began"], 0), 2**31 - 1)

    def _arrays(self, users: list[dict[str, Any]], size: int) -> dict[str, np.ndarray]:
        """The inputs of the program for some users, and nobody behind them."""
        length = self.manifest["max_length"]
        arrays = {name: np.zeros((size, length), np.int32) for name in ("items", "times", "events")}
        width, longest = FEWEST_SEEN, max(len(user["items"]) for user in users)
        while width < longest:
            width *= SEEN_FACTOR
        arrays |= {"asked": np.zeros(size, np.int32), "seen": np.zeros((size, width), np.int32)}
        for row, user in enumerate(users):
            for name in ("items", "times", "events"):
                last = user[name][-length:]
                arrays[name][row, : len(last)] = last
            arrays["asked"][row] = user["asked"]
            arrays["seen"][row, : len(user["items"])] = user["items"]
        return {name: array for name, array in arrays.items() if name in self._inputs}

    def _told(self, names: list[str], outputs: Any) -> Iterator[dict[str, Any]]:
        """A line of each user; whoever fills up a batch has none."""
        first, *others = (np.asarray(output)[: len(names)] for output in outputs)
        if not others:
            if not np.isfinite(first).all():
                raise Fault("a user's vector is not finite; the model cannot be used")
            for name, row in zip(
                names, first.reshape(len(names), self.manifest["interests"], -1), strict=True
            ):
                yield {"user_id": name, "vectors": row.tolist()}
            return
        (scores,) = others
        if np.isnan(scores).any() or np.isposinf(scores).any():
            raise Fault("scores are not finite; the model cannot be used")
        for name, ids, row in zip(names, first, scores, strict=True):
            there = int((ids > 0).sum())
            items = [self._items[i - 1] for i in ids[:there].tolist()]
            yield {"user_id": name, "item_ids": items, "scores": row[:there].tolist()}


def _batches(users: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    some: list[dict[str, Any]] = []
    for user in users:
        some.append(user)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


def read_users(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Users from JSON lines; raises Fault for a line that is none."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            user = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Fault(f"line {number}: not JSON ({error}); expected a user a line") from None
        if not isinstance(user, dict):
            raise Fault(f"line {number}: expected an object with user_id and item_ids")
        yield user


def _utf8(stream: TextIO) -> TextIO:
    """The stream in JSON's own encoding, whatever the machine's is."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8")
    return stream


@contextlib.contextmanager
def _writing(out: str) -> Iterator[TextIO]:
    """Standard output, or a file that is there whole or not at all."""
    if not out:
        _utf8(sys.stdout)
        yield sys.stdout
        sys.stdout.flush()  # here, where it is told if nobody reads it any more, or the disk is full
        return
    place = Path(os.path.realpath(out))  # a link stays one
    temporary = place.with_name(f".{place.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Recommends; returns the exit status, 2 where the folder, the input or a flag is wrong."""
    parser = argparse.ArgumentParser(description="Recommends with a folder that `dynrec export` wrote.")
    parser.add_argument("--histories", default="-", help="JSON lines, a user a line [standard input]")
    parser.add_argument("--out", default="", help="JSON lines to write [standard output]")
    parser.add_argument("--at", type=int, help="when lists are asked for, in seconds since 1970")
    parser.add_argument("--batch_size", type=int, default=256, help="users that are computed together [256]")
    parser.add_argument(
        "--query", action="store_true", help="users' vectors, to ask an index with, not lists"
    )
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="[where this file lies]")
    values = parser.parse_args(arguments)
    try:
        if values.batch_size < 1:
            raise Fault(f"--batch_size={values.batch_size}: expected a number from 1 on")
        # A device would be replaced by a file.
        if os.path.lexists(values.out) and not os.path.isfile(values.out):
            raise Fault(f"--out={values.out}: is there and is no file; leave it out for standard output")
        with contextlib.ExitStack() as stack:
            lines: Iterable[str] = _utf8(sys.stdin)
            if values.histories != "-":
                lines = stack.enter_context(open(values.histories, encoding="utf-8"))
            runner = Runner(values.folder, "query" if values.query else "recommend")
            file = stack.enter_context(_writing(values.out))
            for made in runner.run(read_users(lines), values.batch_size, values.at):
                file.write(json.dumps(made, ensure_ascii=False) + "\n")
    except (Fault, UnicodeError) as error:
        print(f"run.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    for count, what in (
        (runner.unknown_items, "events of unknown items left out"),
        (runner.empty_users, "users without a known item left out"),
    ):
        if count:
            print(f"run.py: {count:,} {what}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
