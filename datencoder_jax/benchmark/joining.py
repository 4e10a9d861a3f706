"""Rows that another run measured, taken into this one's table as they are.

A table of many methods is more than one machine's work. A row's scores say the same wherever its pictures were made,
so they are taken over from the other run's `metrics.json` if what decides the pictures and the scores is equal:
subjects, prompts, seeds, base model, settings, and of a method that both have, its encoder. Their seconds are another
machine's, or another day's: goals and reports do not hold them against this run's.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datencoder_jax.checkpoints.atomic import atomic_write
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.errors import UserError

FORMAT, VERSION = "datencoder-evaluation", 1
"""Of `metrics.json`."""
JOINED = "joined"
"""In a row of `metrics.json`: the command and the device of the run that measured it."""
_EQUAL = ("suite", "fingerprint", "axes", "subjects", "scores")
_FREE = ("jobs", "missing", "model", "data", "encoder")
"""Settings that decide neither pictures nor scores, or are names of what is compared by its content."""


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
            if not ({"command", "device"} <= content.keys() and isinstance(content["settings"], dict)):
                raise ValueError("it does not say what was run")
            [(row["kind"], row["label"], row["values"].items()) for row in content["rows"]]
        except FileNotFoundError:
            raise UserError(f"There is no {path} to join; name a metrics.json of `datencoder evaluate`.") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
    rows: Sequence[Mapping[str, Any]],
    tiles: Mapping[str, Any],
    others: Sequence[tuple[Path, Mapping[str, Any]]],
    folder: Path,
) -> list[dict[str, Any]]:
    """The rows that others have and this run has not, of each the first that is found.

    Left out are those that `left_out` names.

    Args:
        rows: of this run's `metrics.json`.
        tiles: what its sheets of pictures show.
        others: as `read_joined` gives them.
        folder: of this run; sheets of others that show the same are copied to it.
    """
    found = []
    for path, other, row, fits in _further(rows, others):
        if fits:
            source = row.get(JOINED) or {"command": other["command"], "device": other["device"]}
            sheet = row.get("pictures") if other.get("tiles") == tiles else None
            found.append({**row, JOINED: source, "pictures": sheet and _copied(path.parent, sheet, folder)})
    return found


def left_out(rows: Sequence[Mapping[str, Any]], others: Sequence[tuple[Path, Mapping[str, Any]]]) -> list[str]:
    """Sentences on the rows of others that have another encoder than rows of their method that are there already.

    Args:
        rows: of this run, each with at least `label`, `steps` and `made_with`.
        others: as `read_joined` gives them.
    """
    names: dict[Path, list[str]] = {}
    for path, _, row, fits in _further(rows, others):
        if not fits:
            names.setdefault(path, []).append(f"{row['label']}@{row['steps']}")
    return [f"{path}: left out, as made with another encoder: {', '.join(each)}" for path, each in names.items()]


def _further(
    rows: Sequence[Mapping[str, Any]], others: Sequence[tuple[Path, Mapping[str, Any]]]
) -> Iterator[tuple[Path, Mapping[str, Any], Mapping[str, Any], bool]]:
    """Rows of others that are not there yet, and whether their encoder is that of their method's rows before them."""
    have, encoders = {_name(row) for row in rows}, {row["label"]: _encoder(row) for row in rows}
    for path, other in others:
        for row in other["rows"]:
            if _name(row) in have:
                continue
            fits = encoders.setdefault(row["label"], _encoder(row)) == _encoder(row)
            if fits:
                have.add(_name(row))
            yield path, other, row, fits


def _name(row: Mapping[str, Any]) -> tuple[str, int | None]:
    return row["label"], row.get("steps")


def _encoder(row: Mapping[str, Any]) -> str | None:
    return row.get("made_with", {}).get("encoder")


def _copied(source: Path, name: str, folder: Path) -> str | None:
    """Copies a sheet of pictures, whose name is another program's; None where it is not there."""
    name = f"pictures/{Path(name).name}"
    if not (source / name).is_file():
        return None
    if source.resolve() != folder.resolve():
        with atomic_write(folder / name) as temporary:
            shutil.copyfile(source / name, temporary)
    return name
