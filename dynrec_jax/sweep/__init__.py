"""Sweeps: what an experiment file's `get_sweep()` says, carried out by any number of workers."""

from dynrec_jax.sweep.space import choice, integer, over, product, pruned, real, search, when, zip_

__all__ = ["choice", "integer", "over", "product", "pruned", "real", "search", "when", "zip_"]
