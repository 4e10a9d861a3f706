"""Rows that another run measured, taken into this one's table as they are.

A table of many methods is more than one machine's work. A row's scores say the same wherever its pictures were made, so
they are taken over from the other run's `metrics.json` if all that decides the pictures and the scores is equal. Its
seconds are another machine's, or another day's, and are compared with nobody's (`benchmark.goals`).
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.errors import UserError

FORMAT, VERSION = "datencoder-evaluation", 1
"""Of `metrics.json`."""
JOINED = "joined"
"""In a row of `metrics.json`: the command and the device of the run that measured it."""
_EQUAL = ("suite", "fingerprint", "axes", "subjects", "scores")
_FREE = ("jobs", "missing")
"""Settings that decide neither pictures nor scores."""


def read_joined(paths: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The contents of metrics files.

    Raises:
        UserError: one is missing, damaged, or something else.
    """
    found = []
    for path in map(expand_user, paths):
        try:
            content = json.loads(path.read_text("utf-8"))
            if (content["format"], content["version"]) != (FORMAT, VERSION):
                raise ValueError("it is of another kind or version")
            [(row["kind"], row["label"], row["values"]) for row in content["rows"]]
        except FileNotFoundError:
            raise UserError(f"There is no {path} to join; name a metrics.json of `datencoder evaluate`.") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            said = f"{path} cannot be joined ({error}); name a metrics.json of `datencoder evaluate`."
            raise UserError(said) from error
        found.append((path, content))
    return found


def check_joined(frame: Mapping[str, Any], others: Sequence[tuple[Path, Mapping[str, Any]]]) -> None:
    """Sees that other runs measured what this one measures.

    Args:
        frame: of this run's `metrics.json`, what is not its rows.
        others: as `read_joined` gives them.

    Raises:
        UserError: another run had other subjects, prompts, scores, settings or another base model.
    """
    frame = json.loads(json.dumps(frame))
    for path, other in others:
        names = [name for name in frame["settings"] if name not in _FREE]
        pairs = [(name, other.get(name), frame[name]) for name in _EQUAL]
        pairs += [(name, other["settings"].get(name), frame["settings"][name]) for name in names]
        for name, theirs, ours in pairs:
            if theirs != ours:
                raise UserError(f"{path} cannot be joined: its {name} is not that of this run; leave it out of --join.")


def joined_rows(
    rows: Sequence[Mapping[str, Any]], others: Sequence[tuple[Path, Mapping[str, Any]]], folder: Path
) -> list[dict[str, Any]]:
    """The rows that others have and this run has not, of each the first that is found.

    Args:
        rows: of this run's `metrics.json`.
        others: as `read_joined` gives them.
        folder: of this run; the sheets of pictures are copied to it where they are there.
    """
    have, found = {_name(row) for row in rows}, []
    for path, other in others:
        for row in other["rows"]:
            if _name(row) not in have:
                have.add(_name(row))
                source = row.get(JOINED) or {"command": other["command"], "device": other["device"]}
                found.append({**row, JOINED: source, "pictures": _copied(path.parent, row.get("pictures"), folder)})
    return found


def _name(row: Mapping[str, Any]) -> tuple[str, int | None]:
    return row["label"], row.get("steps")


def _copied(source: Path, name: str | None, folder: Path) -> str | None:
    if name is None or not (source / name).is_file():
        return None
    if source.resolve() != folder.resolve():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    return name
