"""Recipes: a Python file whose `get_config(variant)` returns the configuration of a stage, and changes to its values.

A change is written `optim.lr=1e-4`, or `data.0.path=...` for an item of a tuple of sections. Its text is read as the
type of the value that stands there, so a recipe's values say what may be set, and nothing else can be. Only a tuple of
sections can be replaced as a whole, by JSON.
"""

import difflib
import json
import math
import os
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from datencoder_jax.checkpoints.paths import expand_user, find_shipped, shipped_files
from datencoder_jax.errors import UserError

VARIANTS = ("full", "smoke")
"""What every recipe can be asked for: itself, and the same in seconds."""

_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def load_recipe(path: str | Path, variant: str = "full", overrides: Sequence[str] = ()) -> ConfigDict:
    """The configuration that a recipe gives.

    Args:
        path: a Python file with `get_config(variant) -> ConfigDict`; it may import its neighbours. Or the name of a
            recipe that comes with the package, such as "sd15_laion".
        variant: one of `VARIANTS`.
        overrides: changes `KEY=VALUE`, made one after another.

    Raises:
        UserError: the file is missing or broken, there is no such variant, the recipe has no such key, or a value is
            not of the type of the one it replaces.
    """
    if variant not in VARIANTS:
        raise UserError(f"There is no variant {variant!r} of a recipe; choose one of {', '.join(VARIANTS)}.")
    path = find_recipe(expand_user(path))
    config = _run(path, variant)
    for text in overrides:
        _override(config, text, path)
    return config


def find_recipe(path: Path) -> Path:
    """The recipe that comes with the package where `path` is its name ("sd15_laion", "configs/sd15_laion.py")."""
    if path.exists():
        return path
    name = path if path.suffix else path.with_suffix(".py")
    return find_shipped(name if name.parent.name else Path("configs", name), "configs")


def recipe_names() -> list[str]:
    """The names of the recipes that come with the package."""
    return [Path(name).stem for name in shipped_files("configs")]


def _run(path: Path, variant: str) -> ConfigDict:
    if not os.path.isfile(path):  # which no name makes raise, and an ending may have made it too long
        raise UserError(f"There is no recipe {path}; the package comes with {', '.join(recipe_names())}.")
    folder = str(path.parent.absolute())
    sys.path.append(folder)
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise UserError(f"{path} is no recipe: it defines no get_config(variant).")
        config = get_config(variant)
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"The recipe {path} is not Python: {error.msg}, line {error.lineno}.") from error
    except (Exception, SystemExit) as error:  # whatever a recipe may raise
        raise UserError(f"The recipe {path} fails with {_describe(error)}.") from error
    finally:
        sys.path.remove(folder)
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of the recipe {path} returns a {type(config).__name__} instead of a ConfigDict.")
    return config


def _describe(error: BaseException) -> str:
    """The kind of an error and what it says, in one line."""
    try:
        text = str(error)
    except Exception:  # a recipe's own exceptions may fail to say anything
        text = ""
    return " ".join(f"{type(error).__name__}: {text}".split()).rstrip(".: ")


def _override(config: ConfigDict, text: str, path: Path) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"The setting {text!r} is not KEY=VALUE, such as steps=100.")
    names = key.split(".")
    before = _look_up(config, names)
    if _asks_for_pictures(config, names):
        raise UserError(_explain_pictures(config, key, value, path))
    if before is _MISSING:
        raise UserError(f"The recipe {path} has no value {key!r}; {_suggest(key, config)}.")
    try:
        after = _read(value, before, key)
    except ValueError as error:
        raise UserError(f"The setting {text!r} does not fit: {error}.") from error
    _set(config, names, after)


_TAKES_PICTURES = {"encoder": "sd15_laion.py", "e4t": "e4t_faces.py"}
"""By stage, the recipe to name to somebody who has pictures for one that draws its own."""


def _asks_for_pictures(config: ConfigDict, names: Sequence[str]) -> bool:
    """Whether a change names a source of pictures for a recipe whose `data` says how its own are drawn."""
    if names[0] != "data" or not _is_section(config.get("data")) or config.get("stage") not in _TAKES_PICTURES:
        return False
    return len(names) == 1 or names[1].isdecimal() or names[-1] in ("path", "kind")


def _explain_pictures(config: ConfigDict, key: str, value: str, path: Path) -> str:
    """Which recipe takes a folder of pictures, with the command."""
    folder = value
    with suppress(ValueError, TypeError, KeyError, IndexError):
        folder = str(json.loads(value)[0]["path"])
    if key.endswith("kind"):
        folder = "PICTURES"
    recipe = path.parent / _TAKES_PICTURES[str(config.stage)]
    recipe = recipe if recipe.is_file() else Path("configs") / recipe.name
    source = "data=" + json.dumps([{"kind": "folder", "path": folder}], ensure_ascii=False)
    command = ["datencoder", "pretrain", "--config", str(recipe), "--variant", "smoke", "--workdir", "DIR"]
    command += ["--set", source]
    return (
        f"The recipe {path} draws its own pictures of the embedded world and takes none from {key}. For a folder of "
        f"pictures, run: {shlex.join(command)} (--variant smoke is for the embedded model; leave it out for Stable "
        "Diffusion 1.5)."
    )


# --- a place in the configuration: names of keys and numbers of items

_MISSING: Any = object()
_DIGITS = 10  # of the number of an item; Python reads no number of thousands of them


def _look_up(node: Any, names: Sequence[str]) -> Any:
    for name in names:
        if _is_section(node) and name in node:
            node = node[name]
        elif _is_sequence(node) and name.isdecimal() and len(name) < _DIGITS and int(name) < len(node):
            node = node[int(name)]
        else:
            return _MISSING
    return node


def _set(node: Any, names: Sequence[str], value: Any) -> Any:
    """`node` with the value in its place; sections are changed as they are, tuples made anew."""
    if not names:
        return value
    name, *rest = names
    if _is_section(node):
        node[name] = _set(node[name], rest, value)
        return node
    items = list(node)
    items[int(name)] = _set(items[int(name)], rest, value)
    return type(node)(items)


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """The keys of all values, written as for a change."""
    if _is_section(node):
        inside = node.items()
    elif _is_sequence(node) and _is_nested(node):
        inside = enumerate(node)
    else:
        yield prefix.removesuffix(".")
        return
    for name, value in inside:
        yield from _keys(value, f"{prefix}{name}.")


def _suggest(key: str, config: ConfigDict) -> str:
    """The keys most like one that is unknown, or what there is to choose from."""
    keys = list(_keys(config))
    near = difflib.get_close_matches(key, keys, n=3)
    # The right name in the wrong section, or without its section.
    last = key.rpartition(".")[2]
    names = difflib.get_close_matches(last, {known.rpartition(".")[2] for known in keys}, n=2)
    near += [known for name in names for known in keys if known.rpartition(".")[2] == name and known not in near]
    return f"did you mean {' or '.join(near[:3])}?".rstrip("?") if near else f"it has {', '.join(config)}"


# --- a value


def _read(text: str, before: Any, key: str) -> Any:
    """The value that a text says, of the type of the one before.

    Raises:
        ValueError: it says none; the message tells what is wanted.
    """
    if _is_section(before):
        raise ValueError(f"it is a section; set one of its values, {', '.join(before)}")
    if _is_sequence(before):
        return type(before)(_read_items(text, before, key))
    if before is None:
        return None if text == "None" else _literal(text)
    if isinstance(before, bool):
        return _wanted(lambda: _WORDS[text.lower()], f"true or false, as {str(before).lower()} is")
    if isinstance(before, int):
        return _wanted(lambda: _integer(text), f"a whole number, as {before} is")
    if isinstance(before, float):
        return _wanted(lambda: _number(text), f"a number, as {before:g} is")
    if isinstance(before, str):
        return text
    raise ValueError(f"a {type(before).__name__} cannot be set")


def _wanted(read: Callable[[], Any], what: str) -> Any:
    try:
        return read()
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"it has to be {what}") from None


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)  # 1e6
        if not number.is_integer():
            raise
        return int(number)


def _number(text: str) -> float:
    number = float(text)
    if math.isnan(number):
        raise ValueError
    return number


def _read_items(text: str, before: Sequence, key: str) -> list:
    """Items between commas, `1,2` or `(1, 2)` or `[1, 2]`, each of the type of the first before."""
    if _is_nested(before):
        way_out = f"set its values one by one, such as {next(_keys(before, f'{key}.'))}"
        if not all(_is_section(item) for item in before):
            raise ValueError(way_out)
        return _sections(text, f"{way_out}, or all as JSON")
    inner = text.strip()
    if inner[:1] + inner[-1:] in ("()", "[]"):
        inner = inner[1:-1]
    items = [item.strip().strip("\"'") for item in inner.split(",")]
    if items[-1] == "":  # none at all, or Python's (1,)
        items.pop()
    return [_read(item, before[0], f"{key}.0") if before else _literal(item) for item in items]


def _sections(text: str, way_out: str) -> list[dict[str, Any]]:
    """Sections in the place of others, as JSON: `[{"kind": "folder", "path": "pictures"}]`."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(way_out) from None
    if not isinstance(found, list) or not found or not all(isinstance(each, dict) for each in found):
        raise ValueError(way_out)
    return found


def _literal(text: str) -> Any:
    """What a text says by itself, where no type is given: a number, true, false, or else the text."""
    for read in (_integer, _number, lambda text: _WORDS[text.lower()]):
        try:
            return read(text)
        except (KeyError, ValueError, OverflowError):
            continue
    return text


def _is_section(node: Any) -> bool:
    return isinstance(node, Mapping | ConfigDict)


def _is_sequence(node: Any) -> bool:
    return isinstance(node, tuple | list)


def _is_nested(items: Sequence) -> bool:
    return any(_is_section(item) or _is_sequence(item) for item in items)
