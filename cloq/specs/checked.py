"""Frozen values that check themselves: an exact round trip through JSON and YAML, and refusals that name what was wrong."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from cloq.errors import SpecError


def require(condition: bool, message: str) -> None:
    """Raises `SpecError` with the message unless the condition holds."""
    if not condition:
        raise SpecError(message)


def shown(value: Any) -> str:
    """A value for a message: its `repr`, cut where it is long. Few lines of YAML can hold a value whose whole `repr` fills the memory."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"a number of {x.bit_length()} bits"  # Python refuses to write more than 4300 digits


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 120, 120


SEEDS = 2**32
"""How many seeds there are: as many as every library takes."""


def require_seed(name: str, seed: int) -> None:
    """Raises `SpecError` for a seed that a random generator would refuse."""
    require(0 <= seed < SEEDS, f"{name} is {shown(seed)}; allowed: 0 to {SEEDS - 1}")


def one_of(name: str, value: Any, allowed: tuple) -> None:
    """Raises `SpecError` for a value that is not among the allowed ones."""
    require(value in allowed, f"{name} is {shown(value)}; allowed: {', '.join('channel' if a is None else str(a) for a in allowed)}")


_NAMED, _LONGEST_NAME = 10, 100
"""How many unknown names a message has, and how long one may be to be compared with the known ones: both cost time."""


def named(unknown: Iterable[Any], known: Iterable[str]) -> str:
    """Unknown names for a message, each with the known one that was probably meant; of many the first few."""
    known, names = list(known), sorted(unknown, key=shown)

    def one(name: Any) -> str:
        near = difflib.get_close_matches(name, known, 1) if isinstance(name, str) and len(name) <= _LONGEST_NAME else []
        return f"{shown(name)} (meant: {near[0]}?)" if near else shown(name)

    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(one, names[:_NAMED])) + more


class Spec:
    """Round trip and refusal of unknown keys, for frozen dataclasses."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` of it gives an equal spec."""
        return plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]):
        """Raises `SpecError` for an unknown key or a value of the wrong kind."""
        require(isinstance(values, Mapping), f"{cls.__name__} needs a mapping, got {type(values).__name__}")
        hints = typing.get_type_hints(cls)
        unknown = set(values) - set(hints)
        require(not unknown, f"unknown setting {named(unknown, hints)} in {cls.__name__}; known: {', '.join(hints)}")
        return cls(**{key: _parse(hints[key], value, f"{cls.__name__}.{key}") for key, value in values.items()})

    def replace(self, **changes):
        """A copy with other values, validated again."""
        return dataclasses.replace(self, **changes)


def plain(value: Any) -> Any:
    """A value of a spec's field as JSON has it."""
    if isinstance(value, Spec):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def union_members(hint: Any) -> tuple[Any, ...]:
    """Of a type hint: what a union is made of, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _parse(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, Spec):
        return value if isinstance(value, hint) else hint.from_dict(value)
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"{where} needs a list, got {shown(value)}")
        return tuple(_parse(arguments[0], item, where) for item in value)
    allowed = union_members(hint)
    require(not isinstance(value, int) or value.bit_length() <= 64, f"{where} is {shown(value)}; it has to fit into 64 bits")
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if int not in allowed else value
    fits = any(value is None if a is type(None) else type(value) is a for a in allowed)
    names = " or ".join("null" if a is type(None) else a.__name__ for a in allowed)
    require(fits, f"{where} needs {names}, got {shown(value)}")
    return value
