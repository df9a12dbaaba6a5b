"""Which types of events a model learns to predict, and how much each counts."""

from collections.abc import Sequence

import ml_collections

from dynrec_jax.errors import ConfigError


def named_types(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Event types that a config names, or one where it only says that there are some: to plan without a dataset."""
    names = {*config.data.target_events, *(text.rpartition(":")[0] for text in config.loss.event_weights)}
    return tuple(sorted(names)) or (("event",) if config.model.events else ())


def target_types(config: ml_collections.ConfigDict, names: Sequence[str]) -> frozenset[int] | None:
    """Types that are predicted and asked for, by index from 1; None for all, events without a type included.

    Args:
      config: of the run.
      names: of the dataset's event types; index 1 is the first.

    Raises:
      ConfigError: `data.target_events` names a type that the dataset has not.
    """
    wanted = config.data.target_events
    if not wanted:
        return None
    return frozenset(_index("data.target_events", name, names) for name in wanted)


def target_weights(config: ml_collections.ConfigDict, names: Sequence[str]) -> tuple[float, ...]:
    """How much a target counts in the loss, by its event type from 0, no type; empty where all count the same.

    Raises:
      ConfigError: a type that the dataset has not.
    """
    targets = target_types(config, names)
    if targets is None and not config.loss.event_weights:
        return ()
    weights = [1.0] * (len(names) + 1)
    for text in config.loss.event_weights:
        name, _, number = text.rpartition(":")
        weights[_index("loss.event_weights", name, names)] = float(number)
    return tuple(
        weight if targets is None or index in targets else 0.0 for index, weight in enumerate(weights)
    )


def _index(key: str, name: str, names: Sequence[str]) -> int:
    if name not in names:
        known = f"its types are {', '.join(names)}" if names else "its events have no types"
        raise ConfigError(f"config.{key}: the dataset has no event type {name!r}; {known}")
    return list(names).index(name) + 1
