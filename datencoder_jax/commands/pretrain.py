"""`datencoder pretrain`: runs a recipe in a work folder, in one process or as one of several."""

from __future__ import annotations

from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datencoder_jax.checkpoints.atomic import CHECKPOINTS
from datencoder_jax.checkpoints.encoder_folder import check_encoder_place
from datencoder_jax.commands.output_folder import check_replaceable, lock_folder, read_json_object
from datencoder_jax.commands.shared import device_name, say
from datencoder_jax.data.writing import check_writable
from datencoder_jax.errors import UserError
from datencoder_jax.runtime.target import deterministic_operations
from datencoder_jax.training import distributed
from datencoder_jax.training.recipes import load_recipe

ENCODER_STAGES = ("encoder", "e4t")


def run(args: Namespace) -> None:
    """Trains, or goes on where an earlier run stopped; rerunning what is complete exports at once."""
    if args.cpu_devices:
        distributed.split_cpu(args.cpu_devices)
    config = load_recipe(args.config, args.variant, args.set)
    if args.print_config:
        say(config.to_json(indent=2))
        return
    if args.workdir is None:
        raise UserError("Name the folder for checkpoints and metrics with --workdir.")
    if args.export_encoder is not None and config.stage not in ENCODER_STAGES:
        raise UserError(f"--export-encoder takes a recipe of an encoder; {args.config} is one of stage {config.stage}.")
    processes = distributed.joined(args.coordinator, args.processes, args.process)
    with processes, deterministic_operations(bool(args.deterministic)):
        _train(args, config)


def _train(args: Namespace, config: Any) -> None:
    import jax

    devices = _devices()  # all processes, since the first to ask waits for the others
    first = jax.process_index() == 0
    if first:
        say(f"device: {devices}")
    args.workdir = check_writable(args.workdir)
    with lock_folder(args.workdir, "--workdir") if first else nullcontext():
        if first:
            _check_workdir(args)
        _train_and_export(args, config)


def _train_and_export(args: Namespace, config: Any) -> None:
    import jax

    if args.export_encoder is not None:
        args.export_encoder = check_writable(args.export_encoder)
    for place in (config.get("output"), args.export_encoder):
        if place:
            _check_result(check_writable(place), args.workdir)
            if config.stage in ENCODER_STAGES:
                check_encoder_place(place)
    if config.stage in ENCODER_STAGES and not config.get("output"):
        check_encoder_place(args.workdir / "encoder")
    if args.export_encoder is None or not _is_complete(args, config):
        _run_stage(args, config)
    if args.export_encoder is not None and jax.process_index() == 0:
        from datencoder_jax.training.encoder_export import export_encoder

        step = export_encoder(args.workdir, args.export_encoder)
        say(f"wrote the encoder of step {step} to {args.export_encoder}")


def _check_workdir(args: Namespace) -> None:
    """Raises `UserError` where the run would replace files of something else than a training run."""
    folder: Path = args.workdir
    names = ["config.json", "encoder.json", "metrics.jsonl", "scores.json", *(p.name for p in folder.glob("preview_*"))]
    is_run = {"optim", "steps"} <= read_json_object(folder / "config.json").keys()
    if not (folder / "config.json").exists():
        is_run = "base_fingerprint" in read_json_object(folder / "encoder.json")
    check_replaceable(folder, "pretrain", names, lambda _: is_run, overwrite=args.overwrite, option="--workdir")


def _check_result(place: Path, workdir: Path) -> None:
    """Sees, before anything is trained, that what it gives would not take the place of a run's checkpoints."""
    if place.absolute() == workdir.absolute() or (place / CHECKPOINTS).exists():
        raise UserError(
            f"{place} is the work folder of a run, whose checkpoints the result would replace; name another one with "
            "--workdir, --export-encoder or --set output=DIR."
        )


def _run_stage(args: Namespace, config: Any) -> None:
    import jax

    from datencoder_jax.training.stages import run_stage

    try:
        run_stage(config, args.workdir, accept_changes=args.accept_changes)
    except SystemExit as stop:  # the loop was asked to, and has written a checkpoint
        if jax.process_index() == 0:
            say(str(stop))
        raise SystemExit(130) from stop
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "The memory does not suffice; raise mesh.fsdp or accumulate, set remat=true, or lower batch_size."
        ) from error


def _is_complete(args: Namespace, config: Any) -> bool:
    from datencoder_jax.training.encoder_export import newest_step

    step = newest_step(args.workdir)
    return step is not None and step >= config.steps


def _devices() -> str:
    """`8 x TPU v5 lite in 2 processes (tpu)`, or what is said of a single device."""
    import jax

    name = device_name()
    if jax.device_count() == 1:
        return name
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    device = jax.devices()[0]
    return f"{jax.device_count()} x {device.device_kind}{processes} ({device.platform})"
