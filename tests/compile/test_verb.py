"""`dynrec compile` as a user meets it, on devices that CPU devices stand for."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import linen as nn
from rich.console import Console

from dynrec_jax import cli
from dynrec_jax.compile import programs, search
from dynrec_jax.models.model import make_bstm
from dynrec_jax.train.flops import training_cost

from .. import tiny
from ..commands import digest, experiment, one_line

ITEMS, ROWS = 600, 768  # of the catalogue, of its table
DIM, LENGTH, BATCH, NEGATIVES = 8, 8, 8, 6  # of `tiny.SMALL`
NODES, EACH = 2, 4
ROUNDS = 2.5  # said to be expected


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[dict[str, Any], str]:
    """The JSON of a small plan on two nodes of four, and what was printed."""
    folder = tmp_path_factory.mktemp("plan")
    keys = {"data__items": ITEMS, "loss__kind": "sampled", "model__backward_weight": 0.5}
    settings = experiment(folder / "x.py", Path(), **keys)
    out = folder / "plan.json"
    with pytest.MonkeyPatch.context() as patch:
        printed = io.StringIO()
        real = programs.exchange_of_zipf
        patch.setattr(programs, "exchange_of_zipf", lambda *given: (real(*given)[0], ROUNDS))
        patch.setattr("dynrec_jax.verbs.compile.Console", lambda: Console(file=printed, width=140))
        flags = [f"--config={settings}", "--topology=h100:8", f"--slices={NODES}", f"--out={out}"]
        assert cli.main(["compile", *flags]) == 0
    assert [path.name for path in folder.iterdir() if path.suffix in (".json", ".tmp")] == ["plan.json"]
    return json.loads(out.read_text()), printed.getvalue()


def test_the_json_has_what_is_promised(made):
    plan, _ = made
    numbers = {
        "fits", "argument_bytes", "temporary_bytes", "output_bytes", "peak_bytes", "memory_bytes", "room_bytes",
        "collective_bytes", "flops", "seconds", "largest_arrays",
    }  # fmt: skip
    for each in (plan, plan["table"], plan["evaluate"]["encode"], plan["score"]["rank"]):
        assert numbers <= each.keys()
        assert each["fits"] is True
        assert each["peak_bytes"] + each["room_bytes"] == each["memory_bytes"]
        sizes = [array["bytes"] for array in each["largest_arrays"]]
        assert sizes == sorted(sizes, reverse=True)
        assert all(array.keys() == {"shape", "bytes", "op"} for array in each["largest_arrays"])
        assert {"expected", "compute", "memory", "network_within", "network_between", "peaks"} == each[
            "seconds"
        ].keys()
    assert (plan["devices"], plan["slices"], plan["topology"], plan["items"]) == (8, NODES, "h100:8", ITEMS)
    assert plan["mesh"] == {"slice": NODES, "data": EACH, "fsdp": 1, "tensor": 1}
    assert plan["flops"] > 0 == plan["table"]["flops"]


def test_the_table_part_is_given_what_lies_on_one_device(made):
    table = made[0]["table"]
    held = ROWS // EACH * (DIM * 4 * 3 + 4)  # rows, two moments and a count of updates, all of four bytes
    asked = BATCH // 8 * (LENGTH + 1) * 4 + NEGATIVES * 4
    assert table["argument_bytes"] == held + asked


def test_the_exchange_costs_its_rounds(made):
    """Numbers and rows on the way there and back, and gradients once more for each further round."""
    table = made[0]["table"]
    capacity, peers = table["capacity"], EACH
    assert (table["capacities"], table["hops"]) == ([capacity], [peers])
    message = peers * (capacity + 1) * 4 + peers * capacity * DIM * 4
    assert table["rounds"] == ROUNDS
    expected = message * (ROUNDS + 1 + 2 * (ROUNDS - 1))
    assert table["collective_bytes"]["within"]["all-to-all"] == pytest.approx(expected, abs=1)
    # Owners of the same rows in both nodes tell each other what they were sent.
    assert "all-to-all" not in table["collective_bytes"]["between"]
    assert table["collective_bytes"]["between"]["all-gather"] > 0


def test_products_are_those_that_the_model_must_compute(made):
    """Beside what `train.flops` leaves out: attention's scores, all of them, are made again for their gradient.

    Targets' own scores are in its count, and no products of matrices.
    """
    model = make_bstm(tiny.config(loss__kind="sampled", model__backward_weight=0.5), ITEMS)
    variables = jax.eval_shape(lambda: nn.meta.unbox(model.init(jax.random.key(0))))
    cost = training_cost(model, variables["params"], NEGATIVES)
    targets = BATCH * LENGTH
    pairs = targets * LENGTH
    again, own_scores = 2 * DIM * pairs, 3 * 2 * DIM * targets
    traversals = 2  # which `cost` counts itself
    assert made[0]["flops"] * 8 == cost.of(targets, pairs) + traversals * (again - own_scores)


def test_no_array_has_the_size_of_a_second_table(made):
    for numbers in (made[0], made[0]["table"]):
        listed = numbers["largest_arrays"]
        assert listed[-1]["bytes"] < ROWS // EACH * DIM * 4, "the list goes down to less"
        assert f"f32[{ROWS // EACH},{DIM}]" not in [array["shape"] for array in listed]


def test_what_is_printed_says_whether_it_fits_and_that_devices_are_simulated(made):
    _, printed = made
    assert f"{ITEMS} items, {BATCH} histories a step, h100:8: 8 devices in {NODES} slices; fits" in printed
    assert "as the CPU compiler partitions" in printed
    assert "largest arrays of train step" in printed
    assert f"rows to each of {EACH} devices" in printed
    assert f"{ROUNDS:.2f} rounds a step expected" in printed


@pytest.fixture
def settings(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return experiment(tmp_path / "x.py", Path(), data__items=ITEMS)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "--topology is missing"),
        ("--topology=v9:2x2", "'v9' is no kind of device"),
        ("--topology=h100:8 --slices=3", "--slices=3 does not divide 8"),
        ("--topology=h100:8 --out=nowhere/plan.json", "--out=nowhere/plan.json: its folder does not exist"),
        ("--topology=h100:8 --out=.", "--out=.: is a folder"),
        ("--topology=h100:8 --config.mesh.tensor=3", "does not make 8 devices"),
        ("--topology=h100:8 --config.mesh.tensor=4", "4 does not divide model.heads=2"),
        ("--topology=h100:8 --config.mesh.slices=4", "config.mesh.slices: 4, and --slices=1"),
        (
            "--topology=h100:8 --config.data.items=0 --config.dataset=",
            "config.data.items is 0 and config.dataset is empty",
        ),
        ("--topology=h100:8 --config.data.items=-1", "config.data.items: -1; expected 1 to"),
        ("--topology=h100:8 --config.data.items=3000000000", "config.data.items: 3,000,000,000; expected"),
        ("--topology=h100:8 --config.data.items=0 --config.dataset=nowhere", "nowhere: no such folder"),
        (
            "--topology=h100:8 --config.data.items=2000000000 --config.model.dim=256 --config.loss.kind=sampled",
            "take 716.2 GiB on each of 8 devices, which have 59.7 GiB; they need 128 devices, or at most",
        ),
        ("--topology=8 --config.loss.neighbours=0.2", "needs counts of histories"),
        ("--topology=8 --config.model.neighbours=1.0", "add 516 bytes an item"),
        ("--topology=8 --config.model.shrinkage=3.0", "and a vector an item"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_compiled(flags, said, settings, capsys, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setattr("dynrec_jax.compile.measure.compile_program", lambda *_: pytest.fail("compiled"))
    before = digest(settings.parent)
    assert cli.main(["compile", f"--config={settings}", *flags.split()]) == 2
    assert said in one_line(capsys)
    assert digest(settings.parent) == before


def test_the_catalogue_may_be_that_of_a_dataset(tiny_dataset, tmp_path):
    from dynrec_jax.compile.plan import catalogue_size
    from dynrec_jax.config import default_config

    config = default_config()
    config.dataset = str(tiny_dataset.path)
    assert catalogue_size(config) == tiny_dataset.items
    config.data["items"] = 7
    assert catalogue_size(config) == 7


def searched(memory: int, **keys: Any) -> tuple[list[dict[str, Any]], list[tuple[Any, ...]]]:
    """A search in which a step takes 1 byte and 1 second a history on each device along "data"; and what it tried."""
    from dynrec_jax.config import default_config
    from dynrec_jax.errors import ConfigError

    from .test_buffers import target

    tried = []

    def measure(config: Any) -> dict[str, Any]:
        m = config.mesh
        tried.append((m.data, m.fsdp, m.tensor, config.train.batch_size))
        if m.tensor == 2 and "no_tensor" in keys:
            raise ConfigError("no")
        need = config.train.batch_size // m.data
        return {
            "fits": need <= memory, "peak_bytes": need, "room_bytes": memory - need, "seconds": {"expected": need + 1},
        }  # fmt: skip

    config = default_config()
    config.train.batch_size = 16
    config.model.dim = 12
    eight = target()._replace(devices=[target().devices[0]] * 8)
    return search.search(config, eight, measure), tried


def test_a_search_doubles_the_batch_until_it_does_not_fit():
    found, tried = searched(memory=8)
    assert tried == [
        *((8, 1, 1, 16), (8, 1, 1, 32), (8, 1, 1, 64), (8, 1, 1, 128)),
        # Four of eight devices divide 12 features.
        *((2, 4, 1, 16), (2, 4, 1, 32)),
        *((4, 1, 2, 16), (4, 1, 2, 32), (4, 1, 2, 64)),
    ]
    assert len(tried) <= search.MOST
    fitting = [(8, 64), (8, 32), (8, 16), (4, 32), (4, 16), (2, 16)]
    assert [(each["mesh"]["data"], each["batch_size"]) for each in found] == fitting
    assert found[0]["flags"] == (
        "--config.mesh.data=8 --config.mesh.fsdp=1 --config.mesh.tensor=1 --config.train.batch_size=64"
    )
    assert found[0]["histories_per_second"] == 64 / 9


def test_a_search_halves_a_batch_that_is_too_large_and_leaves_out_what_cannot_be():
    found, tried = searched(memory=2, no_tensor=True)
    assert [each[3] for each in tried if each[:3] == (2, 4, 1)] == [16, 8, 4]
    assert [each[3] for each in tried if each[:3] == (4, 1, 2)] == [16]
    assert {each["batch_size"] for each in found if each["mesh"]["data"] == 2} == {4}
