"""YAML recipe + dotted overrides -> frozen `Config`; and back to YAML.

Names and types are checked here, setting by setting, so that messages name the key, what came, what
is allowed and the nearest valid key; OmegaConf merges and writes YAML.
"""

from __future__ import annotations

import builtins
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf

from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.recipe_files import find_recipe
from megatron_sgopd.config.schema import Config

MISSING = "???"
MAX_INT = 2**63 - 1


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers, keys as they are written, and none of them twice."""

    def construct_document(self, node: Any) -> Any:
        self.deep_construct = True  # a value that holds itself is an error
        return super().construct_document(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"line {line}: a key must be a word")
            if key_node.value in seen:
                raise ConfigError(
                    f"line {line}: key {key_node.value!r} comes twice; keep one of them"
                )
            seen.add(key_node.value)
            key_node.tag = "tag:yaml.org,2002:str"  # `on`, `3` and `<<` too
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-5 for a word, 010 for 8 and 1:30 for 90.
_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][\d_]*)$",
    "tag:yaml.org,2002:float": (
        r"([-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*([eE][-+]?\d+)?"
        r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$"
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in _NUMBERS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+0123456789."))


def load_config(
    recipe: str | Path, overrides: Sequence[str] = (), *, unread: Sequence[str] = ()
) -> Config:
    """The recipe with `section.key=value` overrides applied; types and names checked.

    `unread`: text fields that every recipe must set and this command does not read: "" where unset.

    Raises:
        ConfigError: naming file and line or override, key, what came and what is allowed.
    """
    path = find_recipe(recipe)
    tree, lines = _read_recipe(path), _key_lines(path)
    settings = [(key, value, f"{recipe}:{lines[key]}") for key, value in _leaves(tree)]
    settings += [(*_parse_override(text), f"override {text!r}") for text in overrides]
    settings = [*((key, "", "unread") for key in unread), *settings]
    settings = [(key, _checked(key, value, where), where) for key, value, where in settings]
    config = OmegaConf.merge(OmegaConf.structured(Config), _tree(settings))
    _check_missing(config, str(recipe))
    built = OmegaConf.to_object(config)
    assert isinstance(built, Config), "the structured config is a Config"
    return built


def to_yaml(config: Config) -> str:
    """The whole config; `load_config` of it gives the same config back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(config: Config) -> dict[str, Any]:
    """{dotted key: value} of every field."""
    return dict(_leaves(asdict(config)))


def diff(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (value in a, value in b)} where they differ."""
    left, right = flatten(a), flatten(b)
    return {
        key: (left.get(key), right.get(key))
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    }


# -- reading ---------------------------------------------------------------------------------------


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not YAML ({_problem(error)})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error.reason})") from error
    except ConfigError as error:
        raise ConfigError(f"{path}, {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds {type(tree).__name__}; a recipe is a mapping of sections, such as "
            "'model:' and 'distill:'"
        )
    return tree


def _key_lines(path: Path) -> dict[str, int]:
    """{dotted key: line} of every key of the file."""
    lines: dict[str, int] = {}

    def walk(node: Any, prefix: str) -> None:
        for key_node, value_node in node.value:
            key = f"{prefix}{key_node.value}"
            lines[key] = key_node.start_mark.line + 1
            if isinstance(value_node, yaml.MappingNode):
                walk(value_node, key + ".")

    root = yaml.compose(path.read_text(encoding="utf-8"), _Loader)
    if isinstance(root, yaml.MappingNode):
        walk(root, "")
    return lines


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value and f"{prefix}{key}" not in _MAPPINGS:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
        raise ConfigError(f"override {text!r} is not of the form section.key=value")
    try:
        return key, yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"override {text!r}: {value!r} is not a YAML value ({_problem(error)})"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"override {text!r}: {error}") from error


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or str(error).partition("\n")[0])


# -- checking --------------------------------------------------------------------------------------


def _field_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """{dotted key: annotation} of every leaf of the schema."""
    found: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for field in fields(cls):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        is_section = isinstance(hint, type) and is_dataclass(hint)
        found |= _field_types(hint, key + ".") if is_section else {key: hint}
    return found


KEYS = _field_types(Config)
SECTIONS = sorted({key.rsplit(".", 1)[0] for key in KEYS if "." in key})
_MAPPINGS = frozenset(key for key, hint in KEYS.items() if str(hint).startswith("dict"))


def _checked(key: str, value: Any, where: str) -> Any:
    """The value as its field holds it; ConfigError where the field cannot."""
    if value == {} and key in SECTIONS:
        return value
    parent = key.rpartition(".")[0]
    if key not in KEYS and parent not in _MAPPINGS:
        raise ConfigError(f"{where}: {_unknown(key)}")
    hint = KEYS[key] if key in KEYS else get_args(KEYS[parent])[1]
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{where}: {key!r} holds an interpolation {value!r}; write the value")
    if value == MISSING:
        raise ConfigError(f"{where}: {key!r} is {value!r}, which is no value; write one")
    if isinstance(value, int) and abs(value) > MAX_INT:
        raise ConfigError(f"{where}: {key!r} is {value}; at most {MAX_INT} fits")
    if not _fits(value, hint):
        quote = "; quote it" if _fits("text", hint) and not isinstance(value, list | dict) else ""
        raise ConfigError(
            f"{where}: {key!r} is {value!r} ({type(value).__name__}); "
            f"allowed: {_allowed(hint)}{quote}"
        )
    takes_float = float in (hint, *get_args(hint))
    return float(value) if type(value) is int and takes_float else value


def _fits(value: Any, hint: Any) -> bool:
    """Exactly, where OmegaConf would turn true into 1 and 3 into '3'; an int is a float."""
    inner = get_args(hint)
    match get_origin(hint) or hint:
        case typing.Literal:
            return isinstance(value, str) and value in inner
        case types.UnionType:
            return any(_fits(value, each) for each in inner)
        case builtins.list:
            return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
        case builtins.dict:
            return isinstance(value, dict) and all(_fits(v, inner[1]) for v in value.values())
        case builtins.float:
            return isinstance(value, int | float) and not isinstance(value, bool)
        case plain:
            return type(value) is plain


def _allowed(hint: Any) -> str:
    if get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(get_args(hint))
    return hint.__name__ if type(hint) is type else str(hint).replace("None", "null")


def _tree(settings: Sequence[tuple[str, Any, str]]) -> dict[str, Any]:
    """The settings as one nested mapping; the last of a key wins."""
    tree: dict[str, Any] = {}
    for key, value, _ in settings:
        if key in SECTIONS:  # an empty one, which sets nothing
            continue
        *path, leaf = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


def _unknown(key: str) -> str:
    if key in SECTIONS:
        inside = ", ".join(k for k in KEYS if k.rsplit(".", 1)[0] == key)
        return f"{key!r} is a section, not a value; its keys: {inside}"
    leaf = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, [*KEYS, *SECTIONS], 1, 0.6)
    near = near or [k for k in KEYS if k.rsplit(".", 1)[-1] == leaf]
    hint = f"the nearest valid key is {near[0]!r}" if near else f"sections: {', '.join(SECTIONS)}"
    return f"unknown key {key!r}; {hint}"


def _check_missing(config: Any, recipe: str) -> None:
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(
            f"{recipe}: {', '.join(missing)} must be set, in the recipe or as key=value"
        )
