"""What a setting may be, said in its type: `lr: Positive = 1e-3`. A class that gives a field another default keeps its bounds."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple, Union

from subnet_pipelines.errors import Refusal


class Bound(NamedTuple):
    """`must`: what follows that word in a refusal."""

    must: str
    holds: Callable[[float], bool]


Count = Annotated[int, Bound("be at least 1", lambda v: v >= 1)]
Several = Annotated[int, Bound("be at least 2", lambda v: v >= 2)]
Whole = Annotated[int, Bound("not be negative", lambda v: v >= 0)]
Positive = Annotated[float, Bound("be positive", lambda v: v > 0)]
NotNegative = Annotated[float, Bound("not be negative", lambda v: v >= 0)]
Share = Annotated[float, Bound("be in (0, 1]", lambda v: 0 < v <= 1)]
Part = Annotated[float, Bound("be in (0, 1)", lambda v: 0 < v < 1)]
Fraction = Annotated[float, Bound("be in [0, 1)", lambda v: 0 <= v < 1)]


def check_bounds(config: Any) -> None:
    """Raise Refusal for the first field of a dataclass, None apart, that is not what its type, or that of a base's field, says."""
    for cls in reversed(type(config).__mro__):
        for name, kind in typing.get_type_hints(cls, include_extras=True).items():
            for bound, value in bounds_of(kind, getattr(config, name, None)):
                if not bound.holds(value):
                    raise Refusal(f"{name} must {bound.must}, got {value}")


def bounds_of(kind: Any, value: Any) -> Iterator[tuple[Bound, float]]:
    """The bounds of a type, each with the number in the value that it is for."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated and isinstance(value, (int, float)):
        yield from ((bound, value) for bound in args[1:])
    elif origin in (Union, types.UnionType):
        for arg in args:
            yield from bounds_of(arg, value)
    elif origin is dict and isinstance(value, dict):
        for item in value.values():
            yield from bounds_of(args[1], item)
    elif origin is list and isinstance(value, list):
        for item in value:
            yield from bounds_of(args[0], item)
