"""The unit of training data, shared by the input pipeline and the models."""

from typing import Any, NamedTuple

PAD = 0  # the id of padding in every array of item indices; real items are 1 .. N


class Batch(NamedTuple):
    """Windows of histories, oldest event first, several to a row where they fit; padding on the right.

    A window holds one event more than the encoder reads, so that each of L positions has a target in either
    direction: the forward traversal reads `[:, :-1]` and predicts `[:, 1:]`, the backward one reads `[:, 1:]` and
    predicts `[:, :-1]`. Windows are kept apart by their segment: none looks at, or predicts, another's events.

    Attributes:
      items: int32[R, L + 1], item indices.
      times: int32[R, L + 1], seconds since the dataset's first event; zeros where the data has no times.
      events: int32[R, L + 1], event types from 1; zeros where the data has none.
      segments: int32[R, L + 1], the window's number in the batch, from 1; 0 is padding. It is the same however
        windows are put into rows, so random bits that are made from it are too.
      positions: int32[R, L + 1], events of the window before this one.
      remaining: int32[R, L + 1], events of the window after this one.
    """

    items: Any
    times: Any
    events: Any
    segments: Any
    positions: Any
    remaining: Any


class History(NamedTuple):
    """Ends of histories, one to a row, oldest event first, padding on the right.

    What a model does not read is None.

    Attributes:
      items: int32[B, L], item indices.
      times: int32[B, L], seconds since the dataset's first event.
      events: int32[B, L], event types; 0 where an event has none.
      asked: int32[B], the moment at which what comes next is asked for, in such seconds.
    """

    items: Any
    times: Any = None
    events: Any = None
    asked: Any = None
