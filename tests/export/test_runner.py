"""The runner: jax alone, other people's files held against their checksums, and mistakes told in one line."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dynrec_jax.data.cache import Histories
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.export import runner
from dynrec_jax.export.runner import Fault, Runner, read_safetensors

from .runs import answers, assert_same, lines, recommended, untrained

ALONE = ("jax", "jaxlib", "numpy", "numpy.libs", "ml_dtypes", "opt_einsum", "scipy", "scipy.libs")


def write(path: Path, users: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(user) + "\n" for user in users))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line of a call that must fail."""
    capsys.readouterr()
    assert runner.main([f"--folder={folder}", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("run.py: ")
    return err


def test_the_runner_is_shipped_as_it_is_and_imports_jax_and_numpy_alone(folder: Path):
    source = (folder / "run.py").read_text()
    assert source == Path(runner.__file__).read_text()
    trees = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in trees if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "." for node in trees if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"jax", "numpy"}


def test_a_process_that_can_import_nothing_but_jax_gives_the_lists(
    folder: Path, tiny_dataset: Dataset, histories: Histories, tmp_path: Path
):
    """A folder of links to jax and what it needs is all that this Python can import from."""
    packages = Path(np.__file__).parents[1]
    (tmp_path / "site").mkdir()
    for name in ALONE:
        if (packages / name).exists():
            (tmp_path / "site" / name).symlink_to(packages / name)
    start = f"import sys, runpy; sys.path.append({str(tmp_path / 'site')!r}); sys.argv = sys.argv[1:]; "
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    users, run = lines(histories), untrained(tiny_dataset)
    write(tmp_path / "users.jsonl", users)
    made = subprocess.run(
        [
            *(sys.executable, "-I", "-S", "-c", start, folder / "run.py"),
            *(f"--histories={tmp_path / 'users.jsonl'}", f"--out={tmp_path / 'lists.jsonl'}"),
        ],
        capture_output=True,
        text=True,
    )
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "")
    assert_same(
        read(tmp_path / "lists.jsonl"), recommended(run, histories, 6, True), run.item_ids.to_pylist()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lists.jsonl", "site", "users.jsonl"]


@pytest.mark.slow
def test_a_virtual_environment_with_jax_alone_gives_the_lists(
    folder: Path, tiny_dataset: Dataset, histories: Histories, tmp_path: Path
):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    jax = f"jax=={runner.jax.__version__}"
    subprocess.run([python, "-m", "pip", "install", "--quiet", jax], check=True)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    users = "".join(json.dumps(user) + "\n" for user in lines(histories))
    made = subprocess.run([python, "-I", moved / "run.py"], input=users, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    run = untrained(tiny_dataset)
    found = [json.loads(line) for line in made.stdout.splitlines()]
    assert_same(found, recommended(run, histories, 6, True), run.item_ids.to_pylist())


def test_unknown_items_and_users_without_any_other_are_left_out_and_counted(
    folder: Path, tmp_path: Path, capsys
):
    users = [
        {"user_id": "a", "item_ids": ["i03", "nothing", "i05"]},
        {"user_id": "b", "item_ids": ["nothing"]},
        {"user_id": 7, "item_ids": ["i03", "i05"], "times": [1, 2], "events": ["view", None]},
        {"user_id": "c", "item_ids": []},
    ]
    out = tmp_path / "lists.jsonl"
    flags = [f"--histories={write(tmp_path / 'users.jsonl', users)}", f"--out={out}", "--batch_size=2"]
    assert runner.main([f"--folder={folder}", *flags]) == 0
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "run.py: 2 events of unknown items left out",
        "run.py: 2 users without a known item left out",
    ]
    one, other = read(out)
    assert (one["user_id"], other["user_id"]) == ("a", "7")
    assert one["item_ids"] == other["item_ids"]
    assert not {"i03", "i05"} & set(one["item_ids"])


def test_items_of_before_the_window_are_left_out_too(folder: Path):
    """The model reads eight events; what was seen before them is not recommended either."""
    items = [f"i{number:02d}" for number in range(20)]
    (made,) = answers(Runner(folder), [{"user_id": "a", "item_ids": items}])
    assert set(made["item_ids"]) == {f"i{number:02d}" for number in range(20, 25)}
    assert len(made["scores"]) == 5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: expected an object with user_id and item_ids"),
        ('{"user_id": "a"}', "user number 1: expected user_id and a list item_ids"),
        ('{"user_id": "a", "item_ids": "i01"}', "user number 1: expected user_id and a list item_ids"),
        (
            '{"user_id": "a", "item_ids": ["i01"], "times": [1, 2]}',
            "expected a list times as long as item_ids",
        ),
        ('{"user_id": "a", "item_ids": ["i01"], "events": [[]]}', "user number 1: unhashable type"),
        ("[" * 200_000, "line 1: not JSON"),
        ('{"user_id": "\\ud800", "item_ids": ["i01"]}', "surrogates not allowed"),
    ],
)
def test_a_line_that_is_no_user_is_refused_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys, text: str, told: str
):
    (tmp_path / "users.jsonl").write_text(text + "\n")
    flags = f"--histories={tmp_path / 'users.jsonl'}", f"--out={tmp_path / 'lists.jsonl'}"
    assert told in said(folder, capsys, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["users.jsonl"]


def test_a_file_that_is_not_there_and_flags_that_cannot_be_are_refused(folder: Path, tmp_path: Path, capsys):
    assert "No such file" in said(folder, capsys, f"--histories={tmp_path / 'none'}")
    assert "--batch_size=0" in said(folder, capsys, "--batch_size=0")
    assert "holds no query.stablehlo; --query asks for vectors, of a" in said(folder, capsys, "--query")
    assert "not a folder of `dynrec export`" in said(tmp_path, capsys)


def test_a_folder_or_a_device_is_not_replaced_and_a_link_stays_one(folder: Path, tmp_path: Path, capsys):
    os.mkfifo(tmp_path / "device")
    for name in (".", "device"):
        told = f"--out={tmp_path / name}: is there and is no file; leave it out for standard output"
        assert told in said(folder, capsys, f"--out={tmp_path / name}")
    assert (tmp_path / "device").is_fifo()
    (tmp_path / "link").symlink_to("lists.jsonl")
    (tmp_path / "lists.jsonl").write_text("old")
    users = write(tmp_path / "users.jsonl", [{"user_id": "a", "item_ids": ["i03"]}])
    assert runner.main([f"--folder={folder}", f"--histories={users}", f"--out={tmp_path / 'link'}"]) == 0
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "lists.jsonl")[0]["user_id"] == "a"


def test_a_reader_who_has_gone_is_no_fault_and_json_is_utf8(folder: Path, tmp_path: Path, monkeypatch):
    users = write(tmp_path / "users.jsonl", [{"user_id": "用户", "item_ids": ["i03"]}])
    reader, writer = os.pipe()
    for gone in (False, True):
        if gone:
            os.close(reader)
        with open(writer, "w", encoding="ascii", closefd=gone) as out:
            monkeypatch.setattr(sys, "stdout", out)
            assert runner.main([f"--folder={folder}", f"--histories={users}"]) == 0
        if not gone:
            assert json.loads(os.read(reader, 65_536).decode("utf-8"))["user_id"] == "用户"


@pytest.mark.parametrize("name", ["recommend.stablehlo", "weights.safetensors", "item_ids.json"])
def test_a_file_that_was_changed_is_refused(folder: Path, tmp_path: Path, capsys, name: str):
    broken = shutil.copytree(folder, tmp_path / "broken")
    data = bytearray((broken / name).read_bytes())
    data[len(data) // 2] ^= 1
    (broken / name).write_bytes(data)
    assert f"{name}: is damaged" in said(broken, capsys)
    (broken / name).unlink()
    assert f"{name}: not readable" in said(broken, capsys)


def told_of(folder: Path, tmp_path: Path, capsys: Any, change: Callable[[Any], None]) -> str:
    changed = shutil.copytree(folder, tmp_path / "changed")
    manifest = json.loads((changed / "export.json").read_text())
    change(manifest)
    (changed / "export.json").write_text(json.dumps(manifest))
    return said(changed, capsys)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda manifest: manifest.update(format=2), "has format 2; this runner reads 1"),
        (
            lambda manifest: manifest.update(platforms=["tpu"]),
            "was exported for tpu, and jax runs on cpu here",
        ),
        (
            lambda manifest: manifest["programs"]["recommend"].update(calling_convention=99),
            "the program's calling convention is 99",
        ),
        (
            lambda manifest: manifest["weights"][-1].update(shape=[1, 8]),
            "vectors is missing, or not float32[1, 8]",
        ),
        (lambda manifest: manifest.pop("max_length"), "export.json: is damaged (max_length is no int)"),
        (lambda manifest: manifest.update(files=[]), "export.json: is damaged (files is no dict)"),
        (lambda manifest: manifest["files"].update({"item_ids.json": {}}), "is damaged (KeyError('sha256'))"),
        (lambda manifest: manifest["weights"][0].pop("name"), "is damaged (KeyError('name'))"),
        (lambda manifest: manifest["programs"].clear(), "is damaged (KeyError('recommend'))"),
    ],
)
def test_what_this_jax_or_runner_cannot_read_is_refused(
    folder: Path, tmp_path: Path, capsys, change: Any, told: str
):
    assert told in told_of(folder, tmp_path, capsys, change)


def test_safetensors_are_read_as_the_library_wrote_them(tmp_path: Path):
    rng = np.random.default_rng(0)
    tensors = {
        "b": rng.normal(size=(3, 5)).astype(np.float32),
        "a/x": rng.integers(-9, 9, (2, 1, 4)).astype(np.int32),
        "none": np.zeros((0, 3), np.float32),
        "one": np.array(2.5, np.float32),
    }
    save_file(tensors, tmp_path / "t.safetensors", {"made": "by hand"})
    found = read_safetensors(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def crafted(header: Any, body: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        (2**62).to_bytes(8, "little") + b"{}",
        crafted(b"no json"),
        crafted([]),
        crafted({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 4),
        crafted({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 12),
        crafted({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}),
        crafted({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}),
        crafted({"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}),
        crafted({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}),
        crafted({"a": {"dtype": "F32", "shape": [2]}}),
        crafted({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, data: bytes):
    (tmp_path / "t.safetensors").write_bytes(data)
    with pytest.raises(Fault, match="not readable as safetensors"):
        read_safetensors(tmp_path / "t.safetensors")


def test_scores_that_are_no_numbers_end_it(folder: Path):
    made = Runner(folder)
    made._weights = {name: leaf * np.nan for name, leaf in made._weights.items()}
    with pytest.raises(Fault, match="scores are not finite"):
        answers(made, [{"user_id": "a", "item_ids": ["i01"]}])
