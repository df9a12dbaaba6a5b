"""Will it fit, and how fast could it be: a run's programs compiled for devices that need not be there."""

from pathlib import Path
from typing import Any

import ml_collections
from jax.sharding import Mesh

from dynrec_jax.compile import programs
from dynrec_jax.compile.measure import measure
from dynrec_jax.compile.topology import Target
from dynrec_jax.data.dataset import open_dataset
from dynrec_jax.errors import ConfigError
from dynrec_jax.parallel.mesh import check_model, make_mesh
from dynrec_jax.parallel.table import rows_for
from dynrec_jax.train.loop import model_widths
from dynrec_jax.train.progress import Progress
from dynrec_jax.train.state import check_tables

MOST_ITEMS = 2**31 - 2**13  # so that a table's rows, rounded up, have int32 numbers
PROGRAMS = {
    "train step": programs.step_program,
    "table part": programs.table_program,
    "encode": programs.encode_program,
    "rank": programs.rank_program,
}
SIMULATED = "memory and collectives as the CPU compiler partitions and lays it out; peaks are the GPU's"
COMPILED = "memory and collectives as the TPU compiler lays it out; seconds are what stated peaks would allow"


def catalogue_size(config: ml_collections.ConfigDict) -> int:
    """N: `data.items`, or that of the dataset folder.

    Raises:
      ConfigError: neither is given.
    """
    items = int(config.data["items"])  # `config.data.items` is a method of the dict
    if not 0 <= items <= MOST_ITEMS:
        raise ConfigError(
            f"config.data.items: {items:,}; expected 1 to {MOST_ITEMS:,} (indices are int32), or 0 for the dataset's"
        )
    if items == 0 and not config.dataset:
        raise ConfigError(
            "config.data.items is 0 and config.dataset is empty; give the catalogue's size, "
            "--config.data.items=1000000, or a dataset folder"
        )
    return items or open_dataset(Path(config.dataset)).items


def make_target_mesh(config: ml_collections.ConfigDict, target: Target, items: int) -> Mesh:
    """The config's mesh of a target's devices.

    Raises:
      ConfigError: the mesh does not divide the devices, or the model does not divide over it.
    """
    m = config.mesh
    if m.slices not in (0, target.slices):
        raise ConfigError(
            f"config.mesh.slices: {m.slices}, and --slices={target.slices}; give the same, or 0"
        )
    mesh = make_mesh(m.data, m.fsdp, m.tensor, target.slices, m.tables, target.devices)
    check_model(mesh, rows_for(items), *model_widths(config))
    return mesh


def plan_run(config: ml_collections.ConfigDict, target: Target, progress: Progress) -> dict[str, Any]:
    """Compiles a run's programs for a target; the result is what `dynrec compile --out` writes.

    Raises:
      ConfigError: the config does not fit the target before anything is compiled.
    """
    plan, slices = checked_plan(config, target)
    numbers = {}
    for done, (name, program) in enumerate(PROGRAMS.items()):
        progress.say(f"compiling {name}: up to a minute for each program on a large topology")
        numbers[name] = measure(program(plan), target, slices)
        progress.update(done + 1)
    encode, rank = numbers["encode"], numbers["rank"]
    lists = {
        "users": config.evaluation.batch_size,
        "fits": encode["fits"] and rank["fits"],
        "encode": encode,
        "rank": rank,
    }
    held = programs.held_beside_lists(plan)
    most = max(encode["peak_bytes"], rank["peak_bytes"]) + held
    evaluation = {**lists, "fits": lists["fits"] and most <= target.memory, "held_bytes": held}
    return {
        "topology": target.name,
        "slices": target.slices,
        "devices": len(target.devices),
        "mesh": dict(plan.mesh.shape),
        "items": plan.items,
        "batch_size": config.train.batch_size,
        **numbers["train step"],
        "fits": numbers["train step"]["fits"] and evaluation["fits"],
        "step_fits": numbers["train step"]["fits"],
        "table": {**numbers["table part"], **exchanged(plan)},
        # Both make lists by the same two programs.
        "evaluate": evaluation,
        "score": lists,
        "note": SIMULATED if target.simulated else COMPILED,
    }


def measure_step(config: ml_collections.ConfigDict, target: Target) -> dict[str, Any]:
    """The numbers of the training step alone; raises ConfigError as `plan_run` does."""
    plan, slices = checked_plan(config, target)
    return measure(programs.step_program(plan), target, slices)


def exchanged(plan: programs.Plan) -> dict[str, Any]:
    """The exchange of rows of a step.

    `capacity` are the rows that a device sends each of its peers in the first hop of a round, `capacities` and `hops`
    those of every hop and the peers there; `touched` the rows of its own that a device updates in a round, and `rounds`
    how many a step is expected to take. All but `rounds` are 0 or empty on one device.
    """
    found = plan.exchange
    capacities = list(found.capacities) if found else []
    return {
        "capacity": capacities[0] if capacities else 0,
        "capacities": capacities,
        "hops": list(found.sizes) if found else [],
        "touched": found.touched if found else 0,
        "rounds": plan.rounds,
    }


def checked_plan(config: ml_collections.ConfigDict, target: Target) -> tuple[programs.Plan, list[int]]:
    """A plan that can be compiled, and the slice of each device in the order of its mesh; raises ConfigError."""
    items = catalogue_size(config)
    mesh = make_target_mesh(config, target, items)
    plan = programs.make_plan(config, items, mesh)
    check_tables(plan.state, items, mesh, target.memory)
    return plan, [target.slice_of(device) for device in mesh.devices.flat]
