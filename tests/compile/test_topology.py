"""What `--topology` names: TPUs that libtpu describes, GPUs that CPU devices stand for, and everything else."""

import importlib.util
from types import SimpleNamespace

import jax
import pytest

from dynrec_jax.compile import topology
from dynrec_jax.compile.machines import GIB, GPUS, TPUS
from dynrec_jax.compile.topology import open_target, parse_topology
from dynrec_jax.errors import ConfigError, MachineError
from dynrec_jax.train.peak import stated_peak

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("v5e:16x16", ("v5e", "16x16")),
        ("V5P:4x8x8", ("v5p", "4x8x8")),
        ("h100:8", ("h100", "8")),
        ("a100-40gb:16", ("a100-40gb", "16")),
        ("8", ("h100", "8")),
    ],
)
def test_names_are_read(text: str, found: tuple[str, str]):
    assert parse_topology(text, 2) == found


@pytest.mark.parametrize(
    ("text", "slices", "said"),
    [
        ("v9:2x2", 1, "'v9' is no kind of device; known are v5e:2x2"),
        ("v5litepod-256", 1, "'v5litepod-256' is no kind of device"),
        ("", 1, "'' is no kind of device"),
        ("v5e:", 1, "'' is no shape; expected sizes such as 4x4"),
        ("v5e:16", 1, "'16' is no shape"),
        ("v5e:0x4", 1, "'0x4' is no shape"),
        ("h100:2x4", 1, "'2x4' is no shape; expected a number of devices such as 8"),
        ("h100:0", 1, "'0' is no shape"),
        ("h100:8", 3, "--slices=3 does not divide 8 devices"),
        ("v5e:4x4", 0, "--slices=0; expected 1 or more"),
    ],
)
def test_other_names_are_refused(text: str, slices: int, said: str):
    with pytest.raises(ConfigError) as caught:
        parse_topology(text, slices)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_simulated_devices_stand_for_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    target = open_target("a100:8", 4)
    assert target.devices == jax.devices("cpu")[:8]
    assert [target.slice_of(device) for device in target.devices] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert target.simulated
    assert target.memory == 0.75 * 80 * GIB  # what JAX takes
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert open_target("a100:8", 4).memory == 40 * GIB
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(ConfigError, match=r"XLA_PYTHON_CLIENT_MEM_FRACTION='most'; expected a number"):
        open_target("a100:8", 4)
    with pytest.raises(ConfigError, match="64 devices are asked for, and JAX has started with 8"):
        open_target("a100:64", 1)


def test_without_libtpu_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(topology.libtpu, "installed", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'dynrec-jax\[tpu\]'"):
        open_target("v5e:2x2", 1)


def test_every_machine_has_a_stated_peak():
    for machine in (*TPUS.values(), *GPUS.values()):
        assert stated_peak(machine.kind, "bfloat16")
        assert min(machine.memory, machine.memory_rate, machine.link_rate, machine.network_rate) > 0
        assert machine.memory_rate > machine.link_rate > machine.network_rate


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "slices", "count", "kind"),
    [
        ("v5e:2x2", 1, 4, "TPU v5 lite"),
        ("v5e:16x16", 2, 512, "TPU v5 lite"),
        ("v5e:1x1", 1, 1, "TPU v5 lite"),
        ("v4:2x2x1", 1, 4, "TPU v4"),
        ("v5p:2x2x1", 1, 4, "TPU v5"),
        ("v6e:2x2", 1, 4, "TPU v6 lite"),
        ("tpu7x:2x2x1", 1, 8, "TPU7x"),
    ],
)
def test_tpus_are_described_by_their_compiler(name: str, slices: int, count: int, kind: str, capfd):
    target = open_target(name, slices)
    assert len(target.devices) == count
    assert {device.device_kind for device in target.devices} == {kind} == {target.machine.kind}
    of_devices = [target.slice_of(device) for device in target.devices]
    assert of_devices == [index * slices // count for index in range(count)]
    assert of_devices == [getattr(device, "slice_index", None) or 0 for device in target.devices]
    assert capfd.readouterr().err == "", "libtpu keeps to itself that there is no TPU"


@needs_libtpu
def test_a_topology_that_the_compiler_refuses_is_named_with_its_reason():
    with pytest.raises(ConfigError) as caught:
        open_target("v5e:3x3", 1)
    assert "--topology=v5e:3x3" in str(caught.value)
    assert 'not divisible by the given (or default) chips_per_host_bounds "2x2x1"' in str(caught.value)
    assert "known are v5e:2x2" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "kind"), [("INVALID_ARGUMENT: no such", ConfigError), ("ABORTED: the lock file", MachineError)]
)
def test_a_fault_of_the_compiler_is_no_mistake_of_the_user(said: str, kind: type, monkeypatch):
    def fails(**_: object) -> None:
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(topology.libtpu, "installed", lambda: True)
    monkeypatch.setattr(topology.topologies, "get_topology_desc", fails)
    with pytest.raises(kind, match=said.partition(": ")[2]):
        open_target("v5e:2x2", 1)


def test_what_libtpu_is_told_is_taken_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    seen = {}

    def described(**_: object) -> SimpleNamespace:
        seen.update(topology.os.environ)
        return SimpleNamespace(devices=[])

    monkeypatch.setattr(topology.libtpu, "installed", lambda: True)
    monkeypatch.setattr(topology.topologies, "get_topology_desc", described)
    open_target("v5e:2x2", 1)
    assert (seen["TPU_WORKER_HOSTNAMES"], seen["TPU_SKIP_MDS_QUERY"]) == ("mine", "1")
    assert "TPU_SKIP_MDS_QUERY" not in topology.os.environ
