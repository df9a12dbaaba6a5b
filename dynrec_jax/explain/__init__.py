"""Explanations: the share of each past event in an item's score, and how faithful such shares are."""

from dynrec_jax.explain.explainer import Event, Explainer, Explanation, explain

__all__ = ["Event", "Explainer", "Explanation", "explain"]
