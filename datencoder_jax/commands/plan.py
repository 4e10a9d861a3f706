"""`datencoder plan`: what a recipe or personalization takes of a chip, by the compiler; nothing is run."""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datencoder_jax.commands.shared import say
from datencoder_jax.errors import UserError
from datencoder_jax.training import distributed

if TYPE_CHECKING:
    from datencoder_jax.base import Base
    from datencoder_jax.memory import Memory
    from datencoder_jax.plan.devices import Machine
    from datencoder_jax.plan.measure import Result
    from datencoder_jax.plan.programs import Program


def run(args: Namespace) -> None:
    """Prints the plan.

    Raises:
        SystemExit: with status 1, if something does not fit.
    """
    if args.config is None and args.models is None:
        raise UserError("nothing to plan: name a recipe with --config, or models to personalize with --models")
    if args.config is not None and args.models is not None:
        raise UserError("--config plans for the recipe's model; leave --models out")
    if args.config is not None and (len(args.methods) > 1 or len(args.memory or ()) > 1):
        raise UserError("with --config there is one method and one setting of --memory; several go with --models")
    if args.config is None and (args.set or args.variant != "full" or args.programs):
        raise UserError("--set, --variant and --programs are of a recipe; name it with --config, or leave them out")
    _prepare(args)
    import jax

    from datencoder_jax.plan.devices import find_machine

    machine = find_machine(args.topology)
    before = jax.config.jax_exec_time_optimization_effort  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_exec_time_optimization_effort", args.effort)
    try:
        fits = _recipe(args, machine) if args.config is not None else _models(args, machine)
    finally:
        jax.config.update("jax_exec_time_optimization_effort", before)
    if not fits:
        raise SystemExit(1)


def _prepare(args: Namespace) -> None:
    """What the environment has to say before JAX is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # of how arrays are split the compiler has a lot to say
    if args.topology is None:
        if args.cpu_devices:
            distributed.split_cpu(args.cpu_devices)
        return
    # A compiler alone: it takes no device, asks no cloud where it runs, and may be loaded beside another one.
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)


def _recipe(args: Namespace, machine: "Machine") -> bool:
    """Whether all fits: the recipe's training step on the whole machine, and what its users run on one of the chips."""
    from datencoder_jax import memory
    from datencoder_jax.checkpoints.hub import TOYWORLD
    from datencoder_jax.plan import advice, programs
    from datencoder_jax.plan.measure import measure
    from datencoder_jax.plan.report import table
    from datencoder_jax.plan.shapes import tuning_encoder
    from datencoder_jax.training.recipes import load_recipe

    config: Any = load_recipe(args.config, args.variant, args.set)
    base = _base(args.config, config)
    wanted: list[Program] = []
    asked = set(args.programs or ("train", *_COLUMNS))
    if "train" in asked:
        wanted.append(programs.train(config, base, machine.devices))
    if asked - {"train"}:
        if args.memory:
            setting = _setting(args.memory[0])
        elif args.topology is None:  # as it would be chosen here
            setting = memory.choose(large=config.model != TOYWORLD)
        else:
            setting = memory.of(machine.memory or 0)
        setting = memory.for_xl(setting) if base.text_2 is not None and not args.memory else setting
        encoder = tuning_encoder(base, config.encoder) if args.methods[0] == "datencoder" else None
        one = programs.personalize(base, encoder, setting, config.resolution, machine.devices[0])
        wanted += [program for program in one if program.name in asked]
    results = [_measured(program, machine, measure) for program in wanted]
    step = next((result for result in results if result.program.name == "train"), None)
    turns = advice.knobs(config, step) if step and not step.fits else []
    if args.json:
        found = {"config": str(args.config), "machine": machine.name, "effort": args.effort}
        found |= {"chip": machine.chip._asdict() if machine.chip else None, "fits": all(r.fits for r in results)}
        found |= {"programs": [r.to_dict() for r in results], "advice": [vars(knob) for knob in turns]}
        say(json.dumps(found, indent=1))
    else:
        mesh = step.program.arguments[0].step.sharding.mesh if step else None
        shape = f"; mesh data {mesh.shape['data']}, fsdp {mesh.shape['fsdp']}" if mesh else ""
        say(f"{args.config} on {machine.name}{shape}; GB of one chip and one run\n{table(results)}")
        for result in results:
            _complain(result)
        for number, knob in enumerate(turns, 1):
            say(f"{number}. --set {knob.setting}: {knob.why}; about {knob.saves / 1e9:.1f} GB less")
    return all(result.fits for result in results)


def _base(path: Path, config: Any) -> "Base":
    """The recipe's base model as shapes: those of a folder, if it is here, or of its version."""
    from datencoder_jax.checkpoints.hub import TOYWORLD, resolve_base
    from datencoder_jax.plan.shapes import VERSIONS, base_of_folder, stable_diffusion

    if config.get("stage") != "encoder" or "architecture" not in config:
        raise UserError(f"{path} is no recipe of an encoder on pictures, such as configs/sd15_laion.py")
    if config.model == TOYWORLD or Path(config.model).is_dir():
        return base_of_folder(resolve_base(config.model), config.dtype)
    if config.architecture not in VERSIONS:
        raise UserError(f"architecture is {config.architecture!r}; it can be {', '.join(VERSIONS)}")
    return stable_diffusion(config.architecture, config.dtype, vision=True)


def _measured(program: "Program", machine: "Machine", measure: Any) -> "Result":
    print(f"compiling {program.name} for {machine.name} ...", file=sys.stderr, flush=True)
    return measure(program, machine)


def _complain(result: "Result") -> None:
    if result.fits:
        return
    room = result.room
    there = f"{room.available / 1e9:.1f} GB" if room.available else "the chip's memory"
    # A compiler that runs out may not say what it would have needed.
    needed = f"needs {room.total / 1e9:.1f} GB" if room.total > (room.available or 0) else "needs more than there is"
    way = "" if result.program.name == "train" else "; try --memory 8, or a lower resolution"
    say(f"{result.program.name} does not fit: it {needed} of {there}{way}")


def _models(args: Namespace, machine: "Machine") -> bool:
    """Whether all fits that personalization runs, by model, method and setting."""
    from datencoder_jax import memory
    from datencoder_jax.plan import programs
    from datencoder_jax.plan.measure import measure
    from datencoder_jax.plan.shapes import stable_diffusion, tuning_encoder

    rows, seen = [], {}
    for version in args.models:
        for method in args.methods:
            predicts = method == "datencoder"
            base = stable_diffusion(version, "bfloat16", vision=predicts)
            encoder = tuning_encoder(base) if predicts else None
            for size in args.memory or (0, *memory.PRESETS):
                setting = _setting(size)
                found = {}
                device = machine.devices[0]
                for program in programs.personalize(base, encoder, setting, args.resolution, device):
                    name = program.name
                    key = (version, name, *_decides(name, method, setting))
                    if key not in seen:
                        seen[key] = _measured(program, machine, measure)
                    found[name] = seen[key].beside(program.resident)
                rows.append({"model": version, "method": method, "memory": size, "programs": found})
    if args.json:
        shown = [row | {"programs": [result.to_dict() for result in row["programs"].values()]} for row in rows]
        say(json.dumps({"machine": machine.name, "effort": args.effort, "rows": shown}, indent=1))
    else:
        say(f"{machine.name}, {args.resolution} px, weights in bfloat16; GB of one chip")
        say(f"| model | method | setting | {' | '.join(_COLUMNS)} | most |\n|{'---|' * (4 + len(_COLUMNS))}")
        for row in rows:
            said = {name: _gigabytes(result) for name, result in row["programs"].items()}
            most = _gigabytes(max(row["programs"].values(), key=lambda result: (not result.fits, result.room.total)))
            cells = [said.get(name, "") for name in _COLUMNS]
            setting = f"`--memory {row['memory']}`" if row["memory"] else "none"
            say(f"| {row['model']} | {row['method']} | {setting} | {' | '.join(cells)} | {most} |")
    return all(result.fits for row in rows for result in row["programs"].values())


_COLUMNS = ("see", "predict", "encode", "tune", "draw", "decode")


def _decides(name: str, method: str, setting: "Memory") -> tuple:
    """What a program of personalization depends on beside the model."""
    if name == "encode":
        return ()
    return (setting.in_parts,) if name in ("see", "predict") else (method, setting)


def _setting(size: int) -> "Memory":
    """What `--memory` says; 0 for no savings."""
    from datencoder_jax.memory import PRESETS, Memory

    return PRESETS.get(size, Memory())


def _gigabytes(result: "Result") -> str:
    return f"{result.room.total / 1e9:.1f}" if result.fits else "too much"
