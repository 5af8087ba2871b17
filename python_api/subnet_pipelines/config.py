"""Settings: dataclass <- configs/METHOD/BENCHMARK.yaml <- fidelity preset <- --config FILE <- flags; typed, checked, and no unknown key."""

from __future__ import annotations

import ast
import difflib
import hashlib
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, fields
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union

from subnet_pipelines.benchmarks import BENCHMARKS
from subnet_pipelines.errors import Refusal
from subnet_pipelines.evaluate import RunConfig
from subnet_pipelines.folder import FREE
from subnet_pipelines.methods import METHODS

CONFIGS = Path(__file__).parent / "configs"
FIDELITIES = ("sound", "code", "paper")
ABOUT = ("expected", "source")  # keys of a YAML that are about the run, not settings of it


@lru_cache
def sentences(cls: type) -> dict[str, str]:
    """The sentence under each field of a dataclass, its help."""
    found = {}
    for part in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0].body
        for node, after in pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[node.target.id] = " ".join(str(after.value.value).split())
    return found


class Settings:
    """The configs of a method, a benchmark and the loop as one flat table of fields: defaults and, over them, the recipe."""

    def __init__(self, method: str, benchmark: str):
        self.method, self.benchmark = pick("method", method, METHODS), pick("benchmark", benchmark, BENCHMARKS)
        self.groups = {"method": self.method.Config, "benchmark": self.benchmark.Config, "run": RunConfig}
        self.types, self.help, self.values = {}, {}, {}
        for cls in self.groups.values():
            hints = typing.get_type_hints(cls)
            for f in fields(cls):
                if f.name in self.types:
                    raise TypeError(f"field {f.name} stands in two configs of {method} on {benchmark}")
                self.types[f.name], self.help[f.name] = hints[f.name], sentences(cls).get(f.name, "")
                self.values[f.name] = f.default if f.default is not MISSING else f.default_factory()
        self.fidelity, self.title = "sound", f"{method} on {benchmark}"
        recipe = CONFIGS / method / f"{benchmark}.yaml"
        self.presets: dict[str, dict[str, Any]] = {}  # the recipe's own part of a fidelity preset
        if recipe.exists():
            given = read_yaml(recipe)
            self.presets = given.pop("fidelity", {})
            self.lay(str(recipe), given)

    def resolve(self, file: Path | None = None, flags: dict[str, Any] | None = None, fidelity: str | None = None) -> Settings:
        """Lay preset, file and flags over the recipe, in this order. Raises Refusal for what does not fit."""
        layers, given = [], {}
        if file is not None:
            given = read_yaml(file)
            for word, name in (("method", self.method.name), ("benchmark", self.benchmark.name)):
                if given.pop(word, name) != name:
                    raise Refusal(f"{file}: is for another {word} than {name}")
        self.fidelity = fidelity or given.pop("fidelity", "sound")
        given.pop("fidelity", None)
        if self.fidelity not in FIDELITIES:
            raise Refusal(f"fidelity must be one of {', '.join(FIDELITIES)}, got {self.fidelity!r}")
        for cls in (self.method, self.benchmark):
            layers.append((f"fidelity {self.fidelity} of {cls.name}", cls.FIDELITY[self.fidelity]))
        layers.append((f"fidelity {self.fidelity} of the recipe", self.presets.get(self.fidelity, {})))
        layers += [(str(file), given), ("", flags or {})]
        for where, layer in layers:
            self.lay(where, layer)
        self.build()
        return self

    def lay(self, where: str, layer: dict[str, Any]) -> None:
        """One layer of settings over what is there; `where` is named in refusals."""
        prefix = f"{where}: " if where else ""
        layer = {k: v for k, v in layer.items() if k not in ABOUT}
        for key in layer:
            if key not in self.types:
                raise Refusal(prefix + self.unknown(key))
        lengths = [key for key in ("epochs", "iterations") if layer.get(key) not in (None, "null", "none")]  # as flags spell it
        if len(lengths) == 2:
            raise Refusal(f"{prefix}epochs and iterations both say how long the main phase is; give one")
        if "epochs" in lengths and "iterations" in self.types:
            self.values["iterations"] = None
        for key, value in layer.items():
            try:
                self.values[key] = convert(value, self.types[key])
            except ValueError as error:
                raise Refusal(f"{prefix}{key} must be {error}, got {value!r}") from None
        for key in ("angles", "sets"):  # a list of angles, or of sets, is a stream as long as it
            if layer.get(key) is not None and "tasks" not in layer:
                self.values["tasks"] = len(self.values[key])

    def unknown(self, key: str) -> str:
        """The sentence for a key that is no field here."""
        if found := owners(key):
            return f"{key} does not apply to {self.title}; it is a setting of {', '.join(found)}"
        return f"{key} is no setting of {self.title}" + nearest(key, self.types)

    def build(self) -> tuple[Any, Any, RunConfig]:
        """The three configs, checked."""
        made = [cls(**{f.name: self.values[f.name] for f in fields(cls)}) for cls in self.groups.values()]
        for config in made:
            config.check()
        return tuple(made)

    def hash(self) -> str:
        """Eight hex digits that name this config, whatever its seed and what may change at resume."""
        kept = {k: v for k, v in self.values.items() if k not in FREE}
        return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=4).hexdigest()


def owners(field: str) -> list[str]:
    """The methods and benchmarks that have a field of that name."""
    return [name for table in (METHODS, BENCHMARKS) for name, c in table.items() if field in (f.name for f in fields(c.Config))]


def pick(kind: str, name: str, table: dict[str, Any]) -> Any:
    """table[name], or a Refusal that names the nearest."""
    if name not in table:
        raise Refusal(f"{kind} {name!r} is unknown{nearest(name, table)}")
    return table[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say of the nearest known name, else of all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping of settings. Raises Refusal, naming the file."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except yaml.YAMLError as error:
        raise Refusal(f"{path}: is no YAML ({' '.join(str(error).split())})") from None
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(k, str) for k in found):
        raise Refusal(f"{path}: should hold settings as `name: value`, holds a {type(found).__name__}")
    return {k.replace("-", "_"): v for k, v in found.items()}


def convert(value: Any, kind: Any) -> Any:
    """The value as the type says; strings, as flags give them, are read. Raises ValueError that says what was expected."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        kinds = [a for a in args if a is not type(None)]
        if len(kinds) < len(args) and (value is None or value in ("null", "none")):
            return None
        mapping = isinstance(value, dict) or (isinstance(value, str) and "=" in value)
        return convert(value, next((k for k in kinds if (typing.get_origin(k) is dict) is mapping), kinds[0]))
    if origin is Literal:
        if value in args:
            return value
        raise ValueError(f"one of {', '.join(map(str, args))}")
    if origin is list:
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
        return [convert(item, args[0]) for item in items]
    if origin is dict:
        items = value if isinstance(value, dict) else dict(part.partition("=")[::2] for part in str(value).split(","))
        if not items or not all(isinstance(key, str) and key for key in items):
            raise ValueError("names and values, as in a=1,b=2")
        return {key: convert(item, args[1]) for key, item in items.items()}
    text = isinstance(value, str)
    if kind is bool:
        if isinstance(value, bool):
            return value
        if text and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise ValueError("true or false")
    if kind is str:
        if text:
            return value
        raise ValueError("a string")
    if kind in (int, float):
        word = "a whole number" if kind is int else "a number"
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or (kind is int and isinstance(value, float)):
            raise ValueError(word)
        try:
            found = kind(value)
        except ValueError:
            raise ValueError(word) from None
        if found != found or found in (float("inf"), float("-inf")):
            raise ValueError(f"{word}, finite")
        return found
    raise TypeError(f"config: fields of type {kind} are not supported")
