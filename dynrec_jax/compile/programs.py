"""The programs of a run, traced for devices that need not be there: the same functions that training calls."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from dynrec_jax.batch import Batch
from dynrec_jax.compile.measure import Program
from dynrec_jax.config import describes_items
from dynrec_jax.data.event_types import named_types
from dynrec_jax.errors import ConfigError
from dynrec_jax.evaluate.evaluator import LIST_LENGTH
from dynrec_jax.evaluate.recommender import Recommender, seen_width
from dynrec_jax.models.bstm import Bstm
from dynrec_jax.models.model import make_bstm
from dynrec_jax.models.neighbours import LAST
from dynrec_jax.models.towers.ids import ID_TABLE
from dynrec_jax.parallel import capacity
from dynrec_jax.parallel.blocks import PEER_AXES, TWIN_AXES
from dynrec_jax.parallel.exchange import Exchange
from dynrec_jax.parallel.mesh import row_pieces, table_devices
from dynrec_jax.parallel.rules import sharding
from dynrec_jax.parallel.table import rows_for, rows_of
from dynrec_jax.train.loop import step_arguments
from dynrec_jax.train.plan import exchange_of_zipf
from dynrec_jax.train.state import TrainState, abstract_state, average_decay
from dynrec_jax.train.step import CompiledStep, Inputs
from dynrec_jax.train.table_part import trace_dense, trace_rows


class Plan(NamedTuple):
    """A run that is only planned.

    Attributes:
      config: complete and valid.
      items: N, the catalogue's size.
      mesh: of the target's devices.
      model: of the config.
      state: shapes that know where they lie.
      places: their shardings.
      exchange: sizes of the exchange of rows; None on one device.
      rounds: of that exchange, expected of a step.
    """

    config: ml_collections.ConfigDict
    items: int
    mesh: Mesh
    model: Bstm
    state: TrainState
    places: TrainState
    exchange: Exchange | None
    rounds: float

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L + 1) of a batch whose histories are all as long as they come; as many rows on each device."""
        multiple = math.lcm(row_pieces(self.mesh) * max(self.config.train.accumulation, 1), 8)
        rows = -(-self.config.train.batch_size // multiple) * multiple
        return rows, self.config.data.max_length + 1

    @property
    def users(self) -> int:
        """Users of a batch of lists; as many on each device."""
        pieces = row_pieces(self.mesh)
        return -(-self.config.evaluation.batch_size // pieces) * pieces


def make_plan(config: ml_collections.ConfigDict, items: int, mesh: Mesh) -> Plan:
    """What training would start from, as shapes and places alone; rows are exchanged as Zipf-1.0 ids need it.

    Raises:
      ConfigError: items are more than their ids, which without a dataset cannot be planned.
    """
    if describes_items(config):
        raise ConfigError(
            f"config.item.fusion: {config.item.fusion!r} needs a dataset's items, and a plan has none; use id for the "
            "part of users and ids, and add what towers hold of each item, and BERT with its activations"
        )
    for key, value, more in (
        ("loss.neighbours", config.loss.neighbours, "24 item vectors of each event of a batch"),
        ("model.neighbours", config.model.neighbours, "516 bytes an item, over the devices"),
        ("model.shrinkage", config.model.shrinkage, "516 bytes and a vector an item, over the devices"),
    ):
        if value:
            raise ConfigError(
                f"config.{key}: {value} needs counts of histories, and a plan has none; use 0, and add {more}"
            )
    # Without a dataset, types are those that the config names.
    model = make_bstm(config, items, event_types=named_types(config))
    assert isinstance(model, Bstm)
    fixed = step_arguments(config, model, mesh, None)
    state, places = abstract_state(model, fixed["tx"], fixed["row_tx"], mesh, average_decay(config) > 0)
    plan = Plan(config, items, mesh, model, state, places, None, 1.0)
    if mesh.size == 1:
        return plan
    exchange, rounds = exchange_of_zipf(config, mesh, items, plan.shape)
    return plan._replace(exchange=exchange, rounds=rounds)


def held_beside_lists(plan: Plan) -> int:
    """Bytes of a device that a run holds while it evaluates: the optimizers' state, and vectors that are no table."""
    kept = plan.state.opt_state, plan.state.row_state, plan.state.average
    leaves = jax.tree.leaves((kept, plan.state.tables) if plan.model.normalises else kept)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def step_program(plan: Plan) -> Program:
    """The training step."""
    fixed = step_arguments(plan.config, plan.model, plan.mesh, plan.exchange)
    # CPU devices that stand for others are not to compute a batch in parts, as CPUs themselves do.
    settings = fixed["settings"]._replace(pieces=0)
    step = CompiledStep(plan.mesh, plan.places, **{**fixed, "settings": settings})
    batch = Batch(*[_ints(*plan.shape)] * len(Batch._fields))
    counted = plan.model.sampled and settings.sampling.by_counts
    running: Any = _ints(rows_for(plan.items)) if counted else None
    parts = max(plan.config.train.accumulation, 1)
    traversals = bool(plan.model.forward_weight) + bool(plan.model.backward_weight)  # scored together
    held = plan.shape[0] // row_pieces(plan.mesh) // parts * (plan.shape[1] - 1) * traversals
    return _program("train step", plan, step.trace(plan.state, Inputs(batch, running)), plan.rounds, held)


def table_program(plan: Plan) -> Program:
    """A step's lookup of rows and what it does with their gradients, alone."""
    config, mesh, table = plan.config, plan.mesh, plan.state.tables[ID_TABLE]
    if not plan.model.sampled:
        traced = trace_dense(mesh, table, plan.shape, plan.exchange)
    else:
        fixed = step_arguments(config, plan.model, mesh, plan.exchange)
        traced = trace_rows(
            mesh,
            table,
            plan.state.row_state[ID_TABLE],
            plan.shape,
            config.loss.negatives,
            fixed["row_tx"],
            config.train.clip_norm,
            plan.exchange,
        )
    return _program("table part", plan, traced, plan.rounds)


def encode_program(plan: Plan) -> Program:
    """The first half of evaluation's and scoring's batch of lists: histories become vectors."""
    shape = plan.users, plan.config.data.max_length

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return _ints(*shape, sharding=sharding(plan.mesh, "batch", *(None,) * (len(shape) - 1)))

    history = plan.model.sight.shapes(*shape, ints)
    traced = _recommender(plan).trace_encode(plan.state.params, plan.state.tables[ID_TABLE], history)
    return _program("encode", plan, traced, lookup_rounds(plan, shape))


def lookup_rounds(plan: Plan, shape: tuple[int, int]) -> float:
    """Rounds that a batch of Zipf-1.0 ids needs where nothing is known of them when sizes are chosen."""
    if plan.mesh.size == 1:
        return 1.0
    exchange = capacity.default(plan.mesh, math.prod(shape))
    rows, devices = rows_for(plan.items), table_devices(plan.mesh)
    each = -(-math.prod(shape) // plan.mesh.size)
    drawn = capacity.zipf(np.random.default_rng(0), plan.items, (devices, each))
    # A lookup updates nothing, so that no owner has too much to update.
    need = [*capacity.most(rows_of(drawn, rows), rows, exchange.sizes)[:-1], 0]
    return float(capacity.rounds(need, exchange))


def rank_program(plan: Plan) -> Program:
    """The second half: vectors become lists of the best items of the whole catalogue."""
    config = plan.config
    seen = seen_width(config.data.max_length) if config.evaluation.filter_seen else 1
    where = sharding(plan.mesh, "batch", None)
    vectors = jax.ShapeDtypeStruct((plan.users, plan.model.abra.width), jnp.float32, sharding=where)
    read = vectors, _ints(plan.users, LAST, sharding=where)
    table = plan.state.tables[ID_TABLE]
    traced = _recommender(plan).trace_rank(read, table, _ints(plan.users, seen, sharding=where))
    return _program("rank", plan, traced, plan.rounds, plan.users // row_pieces(plan.mesh))


def _recommender(plan: Plan) -> Recommender:
    k, users = min(LIST_LENGTH, plan.items), plan.config.evaluation.batch_size
    return Recommender(plan.model, plan.mesh, users, k, plan.config.evaluation.filter_seen)


def _program(name: str, plan: Plan, traced: jax.stages.Traced, rounds: float, positions: int = 1) -> Program:
    """With how often loops run of which the program does not tell.

    Args:
      name: of the program.
      plan: of the run.
      traced: the program.
      rounds: of its exchange of rows.
      positions: that a device holds and all of which are scored, block by block.
    """
    together, sampled = plan.config.loss.block_positions, plan.model.sampled
    peers, twins = (math.prod(plan.mesh.shape[axis] for axis in axes) for axes in (PEER_AXES, TWIN_AXES))
    # Against the whole catalogue a block has positions of all devices of a slice; against negatives, of those that
    # hold the same ones.
    alone = max(min(together, positions) // twins, 1) * twins
    shared = min(max(together // peers, 1), positions)
    trips = {
        "softmax": math.ceil(positions / (alone if sampled else shared)),
        "mixture": math.ceil(positions / shared),
        "lookup_rounds": rounds,
        # The first round of an update stands in front of the loops of further ones.
        "norm_rounds": rounds - 1,
        "update_rounds": rounds - 1,
    }
    with jax.set_mesh(plan.mesh):
        return Program(name, traced.lower(), traced.jaxpr, plan.config.model.dtype, trips)


def _ints(*shape: int, **where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32, **where)
