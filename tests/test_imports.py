"""Imports run one way, and nothing in the package can run code that came as data."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dynrec_jax"

# A module imports only from earlier layers or from its own package; neighbours in a layer never meet.
LAYERS: list[set[str]] = [
    {""},  # dynrec_jax itself: its version
    {"errors"},
    {"config_checks"},
    {"config", "batch", "allocator", "files", "libtpu"},
    {"data", "parallel", "compiled"},
    {"negatives"},
    {"losses"},
    {"models"},
    {"evaluate"},
    {"train"},
    {"workdir"},
    {"score", "report", "explain", "export", "compile", "sweep"},
    {"verbs"},
    {"cli"},
    {"__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
CODE_FROM_DATA = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def sources() -> dict[str, str]:
    """Source text by dotted module name; a package goes by `name.__init__`."""
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imported(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base += [node.module] if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def part_of(name: str) -> str:
    """The part of LAYERS that a dotted name below dynrec_jax belongs to."""
    first = name.split(".")[1] if "." in name else ""
    # `from dynrec_jax import __version__` names a value of the package itself; whether another is a value
    # or a module that nobody gave a layer is seen on disk.
    is_module = (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file()
    return first if first in LEVEL or is_module else ""


def layer_faults(module: str, source: str) -> list[str]:
    """Imports of a later layer, of a neighbour in the same layer, or of a part that has no layer."""
    own = part_of(module) if not module.endswith("dynrec_jax.__init__") else ""
    faults = []
    for line, name in imported(module, source):
        part = part_of(name)
        if name.split(".")[0] != "dynrec_jax" or part == own:
            continue
        if part not in LEVEL or own not in LEVEL or LEVEL[part] >= LEVEL[own]:
            faults.append(f"{module}:{line} imports {name}")
    return faults


CALLS = {"eval", "exec", "compile", "__import__", "input"}


def code_faults(module: str, source: str) -> list[str]:
    """Imports of modules that rebuild objects from bytes, and calls that execute text, or wait for somebody to type."""
    faults = [
        f"{module}:{line} imports {name}"
        for line, name in imported(module, source)
        if name.split(".")[0] in CODE_FROM_DATA
    ]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in CALLS:
            faults.append(f"{module}:{node.lineno} calls {node.func.id}")
        for keyword in node.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg == "allow_pickle" and not is_false:
                faults.append(f"{module}:{node.lineno} allows pickle")
    return faults


def test_every_part_of_the_package_has_a_layer():
    assert {part_of(module) for module in sources()} <= LEVEL.keys() | {"__init__"}


def test_no_module_imports_from_a_later_layer_or_a_neighbour():
    assert [fault for module, source in sources().items() for fault in layer_faults(module, source)] == []


def test_data_has_no_jax_in_it():
    faults = [
        f"{module}:{line} imports {name}"
        for module, source in sources().items()
        if part_of(module) == "data"
        for line, name in imported(module, source)
        if name.split(".")[0] in {"jax", "jaxlib", "flax", "optax", "orbax"}
    ]
    assert faults == []


def test_nothing_runs_code_that_came_as_data():
    assert [fault for module, source in sources().items() for fault in code_faults(module, source)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dynrec_jax.losses", "from dynrec_jax.models import abra"),
        ("dynrec_jax.losses", "import dynrec_jax.models.abra"),
        ("dynrec_jax.data.examples", "from dynrec_jax.parallel import mesh"),
        ("dynrec_jax.data.examples", "from ..parallel import mesh"),
        ("dynrec_jax.parallel.mesh", "from dynrec_jax import data"),
        ("dynrec_jax.errors", "def f():\n    from dynrec_jax.config import default_config"),
        ("dynrec_jax.__init__", "from .errors import DataError"),
        ("dynrec_jax.train.step", "from dynrec_jax import cli"),
        ("dynrec_jax.report.html", "from dynrec_jax.score import parts"),
    ],
)
def test_an_import_against_the_stream_is_found(module, source):
    assert len(layer_faults(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "dynrec_jax.models.bstm",
            "from dynrec_jax import losses\nfrom dynrec_jax.models import x\nimport jax",
        ),
        (
            "dynrec_jax.data.sources.table",
            "from ..dataset import x\nfrom . import rows\nfrom ... import errors",
        ),
        ("dynrec_jax.train.loop", "from dynrec_jax import __version__"),
        ("dynrec_jax.models.__init__", "from . import layers"),
    ],
)
def test_an_import_with_the_stream_is_left_alone(module, source):
    assert layer_faults(module, source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from dill import loads",
        "eval('1')",
        "exec(text)",
        "input('continue?')",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
    ],
)
def test_code_from_data_is_found(source):
    assert len(code_faults("dynrec_jax.data.x", source)) == 1


def test_methods_and_refusals_are_no_code_from_data():
    source = "model.eval()\nre.compile('a')\nnp.load(p, allow_pickle=False)"
    assert code_faults("dynrec_jax.data.x", source) == []
