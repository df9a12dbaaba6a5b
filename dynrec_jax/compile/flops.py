"""Floating-point operations of matrix products, counted in a traced program; a multiply-add is two.

Of one device: shapes inside of `shard_map` are one device's by themselves, and what is outside is cut over all devices
of the mesh, as the compiler is asked to do.
"""

import math
from collections.abc import Mapping
from typing import Any

from jax.extend.core import jaxprs_in_params

from dynrec_jax.compile.scopes import direct_scope


def product_flops(jaxpr: Any, devices: int, trips: Mapping[str, float]) -> float:
    """Operations on one device.

    Args:
      jaxpr: of the whole program (`jax.make_jaxpr`).
      devices: of the mesh.
      trips: by named scope, how often the loops right below it run of which the program does not tell; others of that
        kind count once. Of a conditional, the branch with the most counts.
    """
    return _count(jaxpr.jaxpr, "", 1 / devices, trips)


def _count(jaxpr: Any, path: str, share: float, trips: Mapping[str, float]) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            ((contracted, _), _) = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += share * 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
            continue
        at = f"{path}/{equation.source_info.name_stack}/{name}"
        times, inner_share = 1.0, share
        if name == "scan":
            times = params["length"]
        elif name == "while":
            times = trips.get(direct_scope(at, trips) or "", 1.0)
        elif name == "shard_map":
            inner_share = share * math.prod(
                params["mesh"].shape[axis] for axis in params["newly_manual_axes"]
            )
        inside = [_count(inner, at, inner_share, trips) for inner in jaxprs_in_params(params)]
        total += times * (max(inside) if name == "cond" else sum(inside))
    return total
