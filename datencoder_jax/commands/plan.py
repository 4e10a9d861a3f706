"""`datencoder plan`: what a recipe or personalization takes of a device, by the compiler; nothing is run."""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datencoder_jax.commands.shared import say
from datencoder_jax.errors import UserError
from datencoder_jax.plan.environment import prepare_environment
from datencoder_jax.training import distributed

if TYPE_CHECKING:
    from datencoder_jax.base import Base
    from datencoder_jax.memory import Memory
    from datencoder_jax.plan.devices import Machine
    from datencoder_jax.plan.dry_run import PlannedProgram
    from datencoder_jax.plan.measure import Result

_OF_RECIPES = ("train", "previews")
"""Programs that pretraining runs."""


def run(args: Namespace) -> None:
    """Prints the plan.

    Raises:
        SystemExit: with status 1, if something does not fit.
    """
    _check_options(args)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # of how arrays are split the compiler has a lot to say
    if args.topology is not None:
        prepare_environment()
    elif args.cpu_devices:
        distributed.split_cpu(args.cpu_devices)
    import jax

    from datencoder_jax.plan.devices import find_machine

    machine = find_machine(args.topology)
    before = jax.config.jax_optimization_level  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_optimization_level", args.effort)
    try:
        fits = _plan_recipe(args, machine) if args.config is not None else _plan_models(args, machine)
    finally:
        jax.config.update("jax_optimization_level", before)
    if not fits:
        raise SystemExit(1)


def _check_options(args: Namespace) -> None:
    if args.config is None and args.models is None:
        raise UserError("nothing to plan: name a recipe with --config, or models to personalize with --models")
    if args.config is not None and args.models is not None:
        raise UserError("--config plans for the recipe's model; leave --models out")
    if args.config is not None and (len(args.methods) > 1 or len(args.memory or ()) > 1):
        raise UserError("with --config there is one method and one setting of --memory; several go with --models")
    if args.config is None and (args.set or args.variant != "full"):
        raise UserError("--set and --variant are of a recipe; name it with --config, or leave them out")
    if args.config is None and (of_recipes := [name for name in args.programs or () if name in _OF_RECIPES]):
        raise UserError(f"the program {of_recipes[0]} is of a recipe; name it with --config")
    if args.config is not None and args.resolution is not None:
        raise UserError("a recipe has a resolution of its own; change it with --set resolution=PIXELS")


def _plan_recipe(args: Namespace, machine: "Machine") -> bool:
    """Whether all fits: what a recipe's pretraining runs on the whole machine, and what its users run on one device."""
    from datencoder_jax.plan import advice
    from datencoder_jax.plan.report import table
    from datencoder_jax.plan.training import trace_preview_drawing, trace_training_step
    from datencoder_jax.training.recipes import load_recipe

    config: Any = load_recipe(args.config, args.variant, args.set)
    is_domain, method = config.get("stage") == "e4t", args.methods[0]
    if (method == "e4t" and not is_domain) or (is_domain and method not in ("e4t", "datencoder")):
        raise UserError(f"{method} does not start from the encoder that {args.config} pretrains; leave --methods out")
    base = _base_of_recipe(args.config, config, config.dtype, machine)
    results = []
    if "train" in (args.programs or ("train",)):
        results.append(_measure(trace_training_step(config, base, machine.devices), machine))
    step = next((result for result in results if result.program.name == "train"), None)
    if "previews" in (args.programs or ("previews",)):
        results.append(_measure(trace_preview_drawing(config, base, machine.devices), machine))
    if set(args.programs or ("sampling",)) - set(_OF_RECIPES):
        results += [_measure(program, machine) for program in _programs_of_users(args, config, machine)]
    changes = advice.knobs(config, step) if step and not step.fits else []
    if args.json:
        content = {"config": str(args.config), "machine": machine.name, "effort": args.effort}
        content |= {"chip": machine.chip._asdict() if machine.chip else None, "fits": all(r.fits for r in results)}
        content |= {"programs": [r.to_dict() for r in results], "advice": [vars(knob) for knob in changes]}
        say(json.dumps(content, indent=1))
    else:
        mesh = step.program.arguments[0].step.sharding.mesh if step else None
        shape = f"; mesh data {mesh.shape['data']}, fsdp {mesh.shape['fsdp']}" if mesh else ""
        say(f"{args.config} on {machine.name}{shape}; GB of one chip and one run\n{table(results)}")
        for result in results:
            _explain_misfit(result)
        for number, knob in enumerate(changes, 1):
            say(f"{number}. --set {knob.setting}: {knob.why}; about {knob.saves / 1e9:.1f} GB less")
    return all(result.fits for result in results)


def _programs_of_users(args: Namespace, config: Any, machine: "Machine") -> "Iterator[PlannedProgram]":
    """What personalizing with the recipe's encoder runs on one device."""
    from datencoder_jax.checkpoints.hub import TOYWORLD
    from datencoder_jax.loading import stored_dtype
    from datencoder_jax.plan.dry_run import hollow_pipeline, record_programs, tokenizer_folders
    from datencoder_jax.plan.shapes import domain_encoder, tuning_encoder

    dtype = stored_dtype(config.model != TOYWORLD, machine.target)
    base = _base_of_recipe(args.config, config, dtype, machine)
    size, is_xl = args.memory[0] if args.memory else None, base.text_2 is not None
    setting = _memory_setting(size, machine, is_large=config.model != TOYWORLD, is_xl=is_xl)
    method = "e4t" if config.stage == "e4t" else args.methods[0]
    encoder = None
    if method == "datencoder":
        encoder = tuning_encoder(base, config.encoder)
    elif method == "e4t":
        encoder = domain_encoder(base, config.get("domain", "face"), config.encoder)
    folders = tokenizer_folders(base) if config.model != TOYWORLD else [_toyworld_tokenizer()]
    pipeline = hollow_pipeline(base, folders, setting, name=str(config.model), encoder=encoder)
    programs = record_programs(
        pipeline, machine.devices[0], method=method, steps=args.steps, resolution=config.resolution
    )
    return (program for program in programs if not args.programs or program.key in args.programs)


def _toyworld_tokenizer() -> Path:
    from datencoder_jax.checkpoints.hub import ASSETS, TOYWORLD

    return ASSETS / TOYWORLD / "tokenizer"


def _base_of_recipe(path: Path, config: Any, dtype: str, machine: "Machine") -> "Base":
    """The recipe's base model as shapes: those of a folder, if it is here, or of its version."""
    from datencoder_jax.checkpoints.hub import TOYWORLD, resolve_base
    from datencoder_jax.plan.shapes import VERSIONS, base_of_folder, stable_diffusion

    if config.get("stage") not in ("encoder", "e4t") or "architecture" not in config:
        raise UserError(f"{path} is no recipe of an encoder on pictures, such as configs/sd15_laion.py")
    if config.model == TOYWORLD or Path(config.model).is_dir():
        return base_of_folder(resolve_base(config.model), dtype, machine.target)
    if config.architecture not in VERSIONS:
        raise UserError(f"architecture is {config.architecture!r}; it can be {', '.join(VERSIONS)}")
    return stable_diffusion(config.architecture, dtype, machine.target, vision=True)


def _measure(program: "PlannedProgram", machine: "Machine") -> "Result":
    from datencoder_jax.plan.measure import measure

    print(f"compiling {program.name} for {machine.name} ...", file=sys.stderr, flush=True)
    return measure(program, machine)


def _explain_misfit(result: "Result", label: str = "", *, is_smallest: bool = False) -> None:
    """Says that a program does not fit.

    Args:
        label: what the program is of, such as "1.5 lora".
        is_smallest: whether it has the setting that takes least already.
    """
    if result.fits:
        return
    room = result.room
    there = f"{room.available / 1e9:.1f} GB" if room.available else "the chip's memory"
    # A compiler that runs out may not say what it would have needed.
    needed = f"needs {room.total / 1e9:.1f} GB" if room.total > (room.available or 0) else "needs more than there is"
    way = "a lower --resolution" if is_smallest else "--memory 8, or a lower --resolution"
    if result.program.name == "previews":
        way = "a larger --set mesh.fsdp, or fewer --set previews"
    advice = "" if result.program.name == "train" else f"; try {way}"
    say(f"{label}{result.program.name} does not fit: it {needed} of {there}{advice}")


def _plan_models(args: Namespace, machine: "Machine") -> bool:
    """Whether all fits that personalization runs, by model, method and setting."""
    from datencoder_jax import memory
    from datencoder_jax.plan.report import ROW_HEADER, row

    if not args.json:
        say(f"{machine.name}, weights in bfloat16; GB of one device, ms and TFLOP of one run\n{ROW_HEADER}")
    rows, too_large = [], []
    for version, method, size, program, result in _results_of_models(args, machine):
        rows.append({"model": version, "method": method, "memory": size} | result.to_dict())
        if not result.fits:
            too_large.append((result, f"{version} {method}, ", size == min(memory.PRESETS)))
        if not args.json:
            setting = "chosen" if size is None else f"`--memory {size}`"
            say(row([version, method, setting, program.name], result))
    if args.json:
        say(json.dumps({"machine": machine.name, "effort": args.effort, "rows": rows}, indent=1))
    for result, label, is_smallest in () if args.json else too_large:
        _explain_misfit(result, label, is_smallest=is_smallest)
    return not too_large


def _results_of_models(args: Namespace, machine: "Machine") -> Iterator[tuple]:
    """`(version, method, setting, program, result)` of every program; equal programs are compiled once."""
    from datencoder_jax.plan.dry_run import record_programs
    from datencoder_jax.plan.shapes import pipeline_of_version

    compiled: dict[Any, Result] = {}
    for version in args.models:
        for method in args.methods:
            for size in args.memory or (None,):
                setting = _memory_setting(size, machine, is_large=True, is_xl=version == "XL")
                pipeline = pipeline_of_version(version, method, setting, machine.target)
                options = {"method": method, "steps": args.steps, "resolution": args.resolution}
                for program in record_programs(pipeline, machine.devices[0], **options):
                    if args.programs and program.key not in args.programs:
                        continue
                    key = (version, program.name, program.signature)
                    if key not in compiled:
                        compiled[key] = _measure(program, machine)
                    yield version, method, size, program, compiled[key].for_program(program)


def _memory_setting(size: int | None, machine: "Machine", *, is_large: bool, is_xl: bool) -> "Memory":
    """What `--memory` says, 0 for no savings; without it, what a run chooses on the device."""
    from datencoder_jax.memory import PRESETS, Memory, choose, for_xl

    if size is not None:
        return PRESETS.get(size, Memory())
    chosen = choose(is_large, machine.target_with_memory)
    return for_xl(chosen) if is_xl else chosen
