"""`datencoder precompute`: what frozen networks see of a recipe's pictures, for training without running them."""

from __future__ import annotations

from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datencoder_jax.commands.output_folder import lock_folder
from datencoder_jax.commands.shared import count_things, say
from datencoder_jax.data.writing import check_writable
from datencoder_jax.errors import UserError
from datencoder_jax.training import distributed
from datencoder_jax.training.recipes import load_recipe


def run(args: Namespace) -> None:
    """Writes a folder of records for each source of the recipe."""
    if args.cpu_devices:
        distributed.split_cpu(args.cpu_devices)
    config: Any = load_recipe(args.config, args.variant, args.set)
    if config.stage not in ("encoder", "e4t") or "concepts" in config.data:
        raise UserError(f"{args.config} does not train on sources of pictures: there is nothing to precompute.")
    with distributed.joined(args.coordinator, args.processes, args.process):
        import jax

        out, is_first = check_writable(args.out), jax.process_index() == 0
        with lock_folder(out) if is_first else nullcontext():  # the processes of one run share the folder
            _precompute(args, config, out)


def _precompute(args: Namespace, config: Any, out: Path) -> None:
    import jax

    from datencoder_jax.data.folder import listed
    from datencoder_jax.training.encoder_stage import read_frozen
    from datencoder_jax.training.precompute import precompute
    from datencoder_jax.training.sources import open_source

    pipeline, first = read_frozen(config), jax.process_index() == 0
    options = {"views": args.views, "batch_size": args.batch_size, "per_file": args.per_file}
    for number, section in enumerate(config.data):
        folder: Path = out / str(number) if len(config.data) > 1 else out
        source = open_source(section)
        left_out = precompute(pipeline, source, config, folder, **options)
        if left_out:
            say(f"pictures left out: {sum(left_out.values())}{listed(left_out)}")
        if first:
            count = count_things(len(source), "picture")
            say(f'records of {count}; in a recipe: {{"kind": "records", "path": "{folder}"}}')
