"""`python -m datencoder_jax.training --config configs/toyworld_vae.py --workdir runs/toyworld/vae`."""

import argparse
import os
import runpy
from pathlib import Path

from datencoder_jax.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Trains the stage a recipe describes; rerunning into the same work folder goes on where it stopped."""
    parser = argparse.ArgumentParser(prog="python -m datencoder_jax.training", description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a recipe, e.g. configs/toyworld_unet.py")
    parser.add_argument("--variant", default="full", choices=("full", "smoke"), help="default: full")
    parser.add_argument("--workdir", type=Path, required=True, help="checkpoints, log.jsonl, previews")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="override recipe values, e.g. steps=100"
    )
    cpu_help = "split the CPU into this many devices (one per core trains small models fastest)"
    parser.add_argument("--cpu-devices", type=int, default=0, help=cpu_help)
    args = parser.parse_args(argv)
    if args.cpu_devices:
        split = f"--xla_force_host_platform_device_count={args.cpu_devices}"
        # Ten minutes instead of 40 seconds until a collective gives up: the machine may be busy with something else.
        patient = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {split} {patient}"
        # A collective blocks a thread of the pool that all devices compute in, and a device may wait in several at
        # once: with two threads per device they sometimes wait for each other for ever.
        os.environ.setdefault("NPROC", str(8 * args.cpu_devices))
    try:
        if not args.config.is_file():
            raise UserError(f"no recipe {args.config}; the recipes are in configs/")
        config = runpy.run_path(str(args.config))["get_config"](args.variant)
        for item in args.set:
            key, _, value = item.partition("=")
            _override(config, key, value)
        from datencoder_jax.training.stages import run_stage  # after XLA_FLAGS: this initialises JAX

        run_stage(config, args.workdir)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


def _override(config, key: str, value: str) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        config = config.get(parent, {}) if hasattr(config, "get") else {}
    if not hasattr(config, "get") or name not in config:
        raise UserError(f"the recipe has no value {key!r}")
    before = config[name]
    try:
        config[name] = type(before)(float(value)) if isinstance(before, int | float) else value
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}={value} does not fit: the recipe has {before!r} there") from error


if __name__ == "__main__":
    main()
