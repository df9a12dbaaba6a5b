"""Linen modules and pure functions of the model.

Legend of dimensions in names: B batch, L history, D features, H heads, E features of a head, F hidden features,
T tokens or buckets of time, N catalogue, R table rows, C catalogue block, K negatives, k top-k, P positions, Q block
of positions.
"""
