"""Encoders that differ in one thing each, pretrained alike: `python -m datencoder_jax.benchmark.ablations --out DIR`.

Each is the recipe with the changes of `ABLATIONS`, for the same small number of steps from the same random weights.
What was killed goes on when the same command is run again. At the end a table says what each leaves of the denoising
loss (`benchmark.held_out`), and two commands are printed: one measures their pictures, one those of what differs in
tuning and drawing alone (`TUNING`), with the encoder that ships, since how to tune depends on how good the start is.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from datencoder_jax.benchmark.held_out import GROUPS, losses, open_groups
from datencoder_jax.errors import UserError
from datencoder_jax.evaluation.scores import bootstrap
from datencoder_jax.training import distributed
from datencoder_jax.training.encoder_stage import read_frozen
from datencoder_jax.training.recipes import load_recipe
from datencoder_jax.training.stages import run_stage

_PLAIN = "as_it_is"

ABLATIONS: dict[str, dict[str, Any]] = {
    _PLAIN: {},
    "no_contrastive_loss": {"weights.contrastive": 0.0},
    "no_norm_penalty": {"weights.norm": 0.0},
    "one_neighbour": {"weights.neighbours": 1},
    "five_neighbours": {"weights.neighbours": 5},
    "temperature_0.05": {"weights.temperature": 0.05},
    "temperature_0.2": {"weights.temperature": 0.2},
    "no_hypernetwork": {"encoder.hypernetwork": False},
    "rank_1": {"encoder.rank": 1},
    "rank_8": {"encoder.rank": 8},
    "one_path": {"encoder.blend": 1.0},
    "blend_0.25": {"encoder.blend": 0.25},
    "blend_0.75": {"encoder.blend": 0.75},
    "direct_embedding": {"anchors": ()},
    "clip_alone": {"encoder.sees": ("classes", "patches")},
    "denoiser_alone": {"encoder.sees": ("denoiser",)},
    "last_patches_alone": {"encoder.patch_taps": 1},
    "one_picture_each": {"pairs": 0.0},
    "all_pixels_alike": {"weights.focus": 1.0},
}
"""Changes to the recipe by name."""

TUNING = (
    "datencoder",
    "datencoder:blend=1",
    "datencoder:blend=0.75",
    "datencoder:blend=0.25",
    "datencoder:sampling_blend=1",
    "datencoder:sampling_blend=0.75",
    "datencoder:sampling_blend=0.25",
    "datencoder:focus=0",
    "datencoder:lowest=0,highest=1",
    "datencoder:norm_weight=0",
    "datencoder:offsets=off",
    "datencoder:embeddings=off",
    "datencoder:start=word",
)
"""Entries of `datencoder evaluate` that differ in tuning or drawing."""


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """The recipe with changes; names of sections are followed by dots."""
    config = config.copy_and_resolve_references()
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        (config[section] if section else config)[key] = value
    return config


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrains what is not pretrained yet."""
    parser = argparse.ArgumentParser(prog="python -m datencoder_jax.benchmark.ablations", description=main.__doc__)
    parser.add_argument("--config", default="configs/toyworld_encoder.py", help="the recipe (default: %(default)s)")
    parser.add_argument("--variant", choices=("full", "smoke"), default="full")
    parser.add_argument("--steps", type=int, default=800, help="of pretraining (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=ABLATIONS, metavar="NAME", help=", ".join(ABLATIONS))
    parser.add_argument("--cpu-devices", type=int, metavar="N", help="use the CPU, split into so many devices")
    parser.add_argument("--out", type=Path, required=True, help="a folder for each in it")
    args = parser.parse_args(argv)
    try:
        run(args)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


def run(args: argparse.Namespace) -> None:
    """Pretrains them one after the other and prints how to measure them."""
    if args.cpu_devices:
        distributed.split_cpu(args.cpu_devices)
    recipe, folders = load_recipe(args.config, args.variant), {}
    for name in args.only or ABLATIONS:
        workdir = args.out / name
        folders[name] = workdir / "encoder"
        config = changed(recipe, ABLATIONS[name])
        config.update(steps=args.steps, output=str(folders[name]), preview_every=0)
        # So few steps see no more of them, and to draw and encode them takes minutes.
        config.data.concepts = min(config.data.concepts, max(1, args.steps * config.batch_size // 2))
        if (folders[name] / "config.json").exists():
            _check_same(config, workdir / "config.json")
            continue
        print(f"{name}: {ABLATIONS[name] or 'no change'}", file=sys.stderr)
        run_stage(config, workdir)
    print(table(measured(recipe, folders)))
    entries = [f"datencoder:encoder={folder}" for folder in folders.values()]
    for methods, steps, out in ((entries, "0,12", "table"), (TUNING, "12", "tuning")):
        command = ["datencoder", "evaluate", "--suite", "toyworld", "--methods", *methods]
        print(shlex.join([*command, "--steps", steps, "--seeds", "1", "--out", str(args.out / out)]))


def _check_same(config: Any, file: Path) -> None:
    """Sees that an encoder was pretrained as it would be now, wherever the folder was then."""
    if not file.exists():  # one from elsewhere
        return
    before, now = (json.loads(text) | {"output": ""} for text in (file.read_text(encoding="utf-8"), config.to_json()))
    if odd := [name for name in now if now[name] != before.get(name)]:
        name = min(odd, key=lambda name: len(str(now[name])))
        raise UserError(
            f"{file.parent} was pretrained with other settings: {name} was {before.get(name)} and is now {now[name]}; "
            "name another --out, or delete it."
        )


def measured(recipe: Any, folders: Mapping[str, Path]) -> dict[str, dict[str, list[float]]]:
    """Losses of every encoder by name and group; those that were measured before are read."""
    files = {name: folder.parent / "losses.json" for name, folder in folders.items()}
    missing = [name for name, file in files.items() if not file.exists()]
    if missing:
        pipeline = read_frozen(recipe)
        groups = open_groups(pipeline, recipe)
        for name in tqdm(missing, desc="measuring losses", unit="encoder"):
            part = files[name].with_suffix(".part")  # a file is whole or not there
            part.write_text(json.dumps(losses(pipeline, groups, recipe, folders[name])), encoding="utf-8")
            part.replace(files[name])
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}


def table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Markdown: mean losses, or where the recipe as it is was measured too, differences from it with 95 % intervals."""
    lines = ["| encoder | " + " | ".join(GROUPS) + " |", "|---|" + "---|" * len(GROUPS)]
    for name, groups in found.items():
        cells = []
        for group in GROUPS:
            values = np.array(groups[group])
            if name == _PLAIN or _PLAIN not in found:
                cells.append(f"{values.mean():.4f}")
            else:
                d = bootstrap(values - np.array(found[_PLAIN][group]))
                cells.append(f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]" if d.certain else f"{d.mean:+.4f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
