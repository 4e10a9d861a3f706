"""The options of every command, with their help."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datencoder_jax.checkpoints.hub import TOYWORLD
from datencoder_jax.commands.values import integer, number, one_of
from datencoder_jax.toyworld.world import ACCESSORIES, CLASSES, SCENES, STYLES

_MAX_SEED = 2**31 - 1
# Named again here, since the modules that define them come with jax.
_METHODS = (
    "datencoder",
    "lora",
    "textual_inversion",
    "dreambooth",
    "custom_diffusion",
    "e4t",
    "perfusion",
    "infusion",
    "para",
    "disendiff",
)
_SAMPLERS = ("ddim", "dpm++2m", "dpm++2m-karras", "euler", "euler-a")
_VERSIONS = ("1.5", "2.1", "XL")
_PROGRAMS = (
    "train",
    "previews",
    "image-features",
    "prediction",
    "vae-encoding",
    "text-encoding",
    "class-word",
    "text-covariance",
    "subject-mask",
    "initial-state",
    "tuning",
    "sampling",
    "vae-decoding",
)
_GPUS = ("H100", "H200", "A100", "L4", "RTX4090", "T4")
_KINDS = ("diffusers", "kohya", "embedding", "card")


def add_commands(commands: Any) -> None:
    """Adds every command to the subparsers of the command line."""
    _add_personalize(commands)
    _add_generate(commands)
    _add_export(commands)
    _add_evaluate(commands)
    _add_pretrain(commands)
    _add_precompute(commands)
    _add_plan(commands)
    _add_check(commands)
    _add_toyworld(commands)
    _add_info(commands)


def _add_command(commands: Any, name: str, summary: str) -> Callable[..., Any]:
    """Adds a command that runs the module of its name in `commands/`; returns its `add_argument`."""

    def run(args: argparse.Namespace) -> None:
        importlib.import_module(f"datencoder_jax.commands.{name}").run(args)

    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.set_defaults(run=run)
    return parser.add_argument


def _add_personalize(commands: Any) -> None:
    add = _add_command(
        commands, "personalize", "learn a concept from one or several pictures of it, and draw it under prompts"
    )
    add(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a picture of the thing, named before --prompt; further ones must show it too",
    )
    _add_model(add, "--model", f"(default: {TOYWORLD})", default=TOYWORLD)
    add("--encoder", metavar="PATH", help="the tuning-encoder's folder (default: the one embedded with toyworld)")
    add(
        "--vision",
        metavar="PATH",
        help="the CLIP vision tower the encoder looks through, where the model has none: a folder, a file or a Hugging "
        "Face id",
    )
    add(
        "--method",
        choices=_METHODS,
        default=_METHODS[0],
        metavar="NAME",
        help="how it is learnt: one of those below (default: %(default)s)",
    )
    add(
        "--word",
        metavar="TEXT",
        help='what methods without an encoder start at, such as "dog", or "sks dog" with a rare word before it '
        "(default: sks for lora and para, thing for others; the embedded model knows neither sks nor cat)",
    )
    add("--rank", type=integer(1), metavar="N", help="of the weight offsets of lora and para (default: 4)")
    add(
        "--prior",
        type=number(0),
        nargs="?",
        const=1.0,
        metavar="WEIGHT",
        help="also keep how the class is drawn, for lora, dreambooth, custom_diffusion and para (default weight: 1)",
    )
    add("--prior-pictures", type=integer(1), metavar="N", help="of the class that --prior draws first (default: 16)")
    add("--steps", type=integer(0), metavar="N", help="tuning steps; 0 for the start as it is (default: the method's)")
    add(
        "--learning-rates",
        type=number(0),
        nargs=2,
        metavar=("EMBEDDING", "OFFSETS"),
        help="0 leaves a part as it starts (default: the method's)",
    )
    add(
        "--option",
        dest="options",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help="focus, lowest and highest of any method; of the method's own: lock, beta and tau of perfusion, layers of "
        "infusion, calibration of disendiff",
    )
    add(
        "--token",
        default="S*",
        help="the placeholder that stands for the concept in prompts; of disendiff several, with blanks between "
        "(default: %(default)s)",
    )
    _add_prompts(add, "each must contain the token (default: four scenes)")
    add(
        "--export",
        nargs="*",
        choices=_KINDS,
        metavar="KIND",
        help=f"also write files for other programs (see `datencoder export --help`): {', '.join(_KINDS)}; all that "
        "the method allows when none is named",
    )
    _add_name(add)
    _add_drawing(add, "weight of the concept's path against the plain model's (default: the encoder's, or 1)")


def _add_generate(commands: Any) -> None:
    add = _add_command(commands, "generate", "draw prompts, with concepts or without")
    add(
        "--concept",
        nargs="+",
        action="append",
        default=[],
        metavar=("FILE", "WEIGHT"),
        help="a concept.safetensors and the weight of its offsets (default: 1); prompts must then contain its token; "
        "repeat it for several",
    )
    add(
        "--lora",
        nargs="+",
        action="append",
        default=[],
        metavar=("FILE", "WEIGHT"),
        help="a LoRA of diffusers, PEFT or kohya and its weight (default: 1)",
    )
    add(
        "--embedding",
        nargs="+",
        action="append",
        default=[],
        metavar=("FILE", "TOKEN"),
        help="token vectors of diffusers, ComfyUI or A1111, and the word that stands for them (default: the file's)",
    )
    _add_model(add, "--model", f"(default: the model the concept was made for, or {TOYWORLD})")
    _add_prompts(add, "", required=True)
    add("--negative", default="", metavar="TEXT", help="what the pictures should not show; no effect without guidance")
    add(
        "--gate",
        type=number(0),
        nargs=2,
        metavar=("BETA", "TAU"),
        help="of concepts of perfusion: a higher BETA leaves more to the prompt, a lower one more to the concept "
        "(default: the concept's, 0.7 0.15)",
    )
    _add_drawing(add, "weight of the concept's path against the plain model's (default: the concept's)")


def _add_export(commands: Any) -> None:
    add = _add_command(commands, "export", "write a concept as the files that other programs load")
    add("concept", metavar="CONCEPT", help="a concept.safetensors")
    _add_model(add, "--base", "(default: the model the concept was made for)")
    add(
        "--to",
        nargs="+",
        choices=_KINDS,
        metavar="KIND",
        help=f"{', '.join(_KINDS)} (default: all that the concept allows)",
    )
    _add_name(add)
    add("--samples", type=Path, metavar="PNG", help="for the card (default: samples.png beside the concept)")
    add("--out", type=Path, required=True, metavar="DIR", help="where the files go; made if missing")
    _add_overwrite(add)


def _add_evaluate(commands: Any) -> None:
    add = _add_command(commands, "evaluate", "measure methods against each other on a suite of subjects")
    add("--suite", required=True, metavar="NAME", help="toyworld, dreambench, or a folder of pictures (see below)")
    add("--data", metavar="DIR", help="the photographs of dreambench: a copy of github.com/google/dreambooth")
    add(
        "--methods",
        nargs="+",
        required=True,
        metavar="METHOD[:OPTION=VALUE,...][@STEPS]",
        help="one or several, with commas or blanks between (see below)",
    )
    add("--steps", default="0,12", metavar="N,N", help="of tuning, for all that name none (default: %(default)s)")
    add(
        "--out", type=Path, required=True, metavar="DIR", help="where the results go; made if missing, continued if not"
    )
    _add_overwrite(add)
    add("--seeds", type=integer(1), metavar="N", help="of every subject (default: 2 for toyworld, 1 for photographs)")
    add("--num", type=integer(1), metavar="N", help="pictures per prompt (default: 1 for toyworld, 4 for photographs)")
    add("--instances", type=integer(1), metavar="N", help="subjects (default: 128 of toyworld, all photographed ones)")
    add("--split", choices=("test", "development"), default="test", help="of toyworld (default: %(default)s)")
    add(
        "--word", default="thing", metavar="TEXT", help="class of subjects in a folder that names none (default: thing)"
    )
    add("--jobs", type=integer(1), default=1, metavar="N", help="processes, each on its share of a CPU's cores")
    add(
        "--sweep",
        type=integer(1),
        metavar="N",
        help="choose learning rates on N development instances of toyworld first",
    )
    add("--rates", type=Path, metavar="FILE", help="learning rates chosen earlier (default: rates.json in the folder)")
    add("--retry-failed", action="store_true", help="also do again what failed")
    add(
        "--join",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="metrics.json of other runs: their rows are taken into the table as they are",
    )
    add("--report-only", action="store_true", help="write metrics and report from what is there, and do no more")
    _add_model(add, "--model", f"(default: {TOYWORLD})", default=TOYWORLD)
    add("--encoder", metavar="PATH", help="the tuning-encoder's folder (default: the one embedded with toyworld)")
    add("--vision", metavar="PATH", help="the CLIP vision tower the encoder looks through, where the model has none")
    add(
        "--clip",
        metavar="PATH",
        help="CLIP that scores photographs: a folder or a Hugging Face id (default: the model's)",
    )
    add("--dino", metavar="PATH", help="DINO that scores photographs: a folder, a file or a Hugging Face id")
    add("--draws", type=integer(1), metavar="N", help="samples per tuning step (default: what the memory allows)")
    add("--resolution", type=integer(8), metavar="PIXELS", help="side of the pictures (default: the model's own)")
    add("--sampler", choices=_SAMPLERS, default=_SAMPLERS[0], help=f"{', '.join(_SAMPLERS)} (default: %(default)s)")
    add("--sampling-steps", type=integer(1), default=25, metavar="N", help="(default: %(default)s)")
    add(
        "--guidance",
        type=number(0),
        metavar="SCALE",
        help="of classifier-free guidance, at or below 1 none (default: the model's)",
    )


def _add_model(add: Callable, option: str, note: str, **extra: Any) -> None:
    kinds = f"{TOYWORLD}, a diffusers folder, a .safetensors checkpoint, or a Hugging Face id"
    add(option, metavar="NAME", help=f"{kinds} {note}", **extra)
    add(
        "--prediction-type",
        choices=("epsilon", "v_prediction"),
        help="what the model predicts, where a .safetensors checkpoint does not tell (default: v_prediction for 2.x, "
        "epsilon for others)",
    )
    add(
        "--dtype",
        choices=("auto", "bf16", "f16", "f32"),
        default="auto",
        help="how the weights are stored (default: %(default)s, bf16 but for a small model on a CPU)",
    )
    add(
        "--compute",
        choices=("auto", "bf16", "f16", "f32"),
        default="auto",
        help="the type of computations (default: %(default)s, that of the weights, and f32 on a CPU); bf16 makes a CPU "
        "compute as an accelerator does",
    )
    add(
        "--memory",
        type=int,
        choices=(8, 16, 24),
        help="get along with so many GB of the device's memory (default: as the device has)",
    )


def _add_name(add: Callable) -> None:
    add("--name", default="my_concept", help="of the files for ComfyUI, Forge and A1111 (default: %(default)s)")


def _add_prompts(add: Callable, note: str, *, required: bool = False) -> None:
    # Repeating the option adds to it; an argument that follows it is a prompt, so pictures come before.
    note = f"; {note}" if note else ""
    add(
        "--prompt",
        dest="prompts",
        nargs="+",
        action="extend",
        required=required,
        metavar="TEXT",
        help=f"what to draw, one or several{note}",
    )


def _add_drawing(add: Callable, blend: str) -> None:
    add("--num", type=integer(1), default=4, help="pictures per prompt (default: %(default)s)")
    add(
        "--seed",
        type=integer(0, _MAX_SEED),
        default=0,
        help="the same command with the same seed gives the same pictures on the same machine, on a GPU with "
        "--deterministic alone (default: 0)",
    )
    _add_deterministic(add)
    add("--resolution", type=integer(8), metavar="PIXELS", help="side of the pictures (default: the model's own)")
    add(
        "--scale",
        type=integer(1, 64),
        default=1,
        metavar="N",
        help="write pictures enlarged so many times, every pixel as a square (default: %(default)s)",
    )
    add("--sampler", choices=_SAMPLERS, default=_SAMPLERS[0], help=f"{', '.join(_SAMPLERS)} (default: %(default)s)")
    add("--sampling-steps", type=integer(1), default=25, metavar="N", help="(default: %(default)s)")
    add(
        "--guidance",
        type=number(0),
        metavar="SCALE",
        help="scale of classifier-free guidance; at or below 1 there is none, and drawing takes half the work "
        "(default: 2 for toyworld, 5 for XL, 7.5 for others)",
    )
    add("--blend", type=number(0, 1), metavar="A", help=blend)
    add("--out", type=Path, required=True, metavar="DIR", help="where the results go; made if missing")
    _add_overwrite(add)


def _add_deterministic(add: Callable) -> None:
    add(
        "--deterministic",
        action="store_true",
        default=None,
        help="have a GPU compute the same bits in every run; it is slower, since it adds in a fixed order and does not "
        "choose its kernels by timing them (no effect on other devices)",
    )


def _add_overwrite(add: Callable) -> None:
    add(
        "--overwrite",
        action="store_true",
        help="replace also what another command, or a person, has put there (default: only what an earlier run of this "
        "command wrote)",
    )


def _add_pretrain(commands: Any) -> None:
    add = _add_command(commands, "pretrain", "train what a recipe says, on whatever devices there are")
    _add_recipe(add)
    add("--workdir", type=Path, metavar="DIR", help="checkpoints, metrics, previews; made if missing, continued if not")
    _add_overwrite(add)
    add("--print-config", action="store_true", help="print the recipe with all changes as JSON, and do no more")
    add("--accept-changes", action="store_true", help="go on from checkpoints of a recipe that was another one")
    add(
        "--export-encoder",
        type=Path,
        metavar="DIR",
        help="at its end, or at once where it is complete, write the encoder for `personalize --encoder`",
    )
    _add_deterministic(add)
    _add_processes(add)


def _add_precompute(commands: Any) -> None:
    add = _add_command(commands, "precompute", "compute what frozen networks see of a recipe's pictures, once")
    _add_recipe(add)
    add("--out", type=Path, required=True, metavar="DIR", help="where the records go; what is there already stays")
    add("--views", type=integer(1), default=1, metavar="N", help="crops of each picture (default: %(default)s)")
    add("--batch-size", type=integer(1), default=8, metavar="N", help="pictures on a device (default: %(default)s)")
    add("--per-file", type=integer(1), default=1024, metavar="N", help="pictures in a file (default: %(default)s)")
    _add_processes(add)


def _add_plan(commands: Any) -> None:
    add = _add_command(
        commands, "plan", "say what a recipe, or personalization, takes of a device, without running it or having one"
    )
    _add_recipe(add, required=False)
    add("--models", nargs="+", choices=_VERSIONS, help="without a recipe: Stable Diffusion to personalize, by version")
    add(
        "--topology",
        metavar="NAME",
        help=f"a GPU ({', '.join(_GPUS)}), several of one host such as 8xH100, or a TPU slice such as v5e:16x16 "
        "(default: the devices of this machine)",
    )
    add("--cpu-devices", type=integer(1), metavar="N", help="use the CPU, split into so many devices")
    add("--programs", nargs="+", choices=_PROGRAMS, metavar="PROGRAM", help=f"{', '.join(_PROGRAMS)} (default: all)")
    add(
        "--methods",
        nargs="+",
        choices=_METHODS,
        default=_METHODS[:1],
        metavar="NAME",
        help=f"to personalize with: {', '.join(_METHODS)} (default: {_METHODS[0]})",
    )
    add("--steps", type=integer(1), metavar="N", help="of tuning (default: the method's; 25 at most in one program)")
    add(
        "--memory",
        nargs="+",
        type=int,
        choices=(0, 8, 16, 24),
        help="settings as for personalize; 0 for none (default: what personalize chooses on the device)",
    )
    add("--resolution", type=integer(64), metavar="PIXELS", help="without a recipe (default: the model's own)")
    add("--effort", choices=("O0", "O1", "O2", "O3"), default="O0", help="the compiler's level (default: %(default)s)")
    add("--json", action="store_true", help="print JSON instead of a table")


def _add_check(commands: Any) -> None:
    add = _add_command(
        commands, "check", "check that this device computes what it should, and measure how fast, within minutes"
    )
    add("--quick", action="store_true", help="leave out the pretraining step and the large shapes of attention")
    add(
        "--minutes",
        type=number(0),
        default=8.0,
        metavar="N",
        help="a part that has not begun by then is left out (default: 8)",
    )
    add(
        "--out", type=Path, default=Path("out/check"), metavar="DIR", help="where the results go (default: %(default)s)"
    )
    _add_overwrite(add)


def _add_processes(add: Callable) -> None:
    add("--cpu-devices", type=integer(1), metavar="N", help="use the CPU, split into so many devices")
    add("--coordinator", metavar="HOST:PORT", help="where process 0 is reached, at a port that is free there")
    add(
        "--processes",
        type=integer(1),
        metavar="N",
        help="how many there are; 1 for this one alone, whatever started it",
    )
    add("--process", type=integer(0), metavar="I", help="which one this is, from 0 on")


def _add_recipe(add: Callable, *, required: bool = True) -> None:
    add("--config", required=required, metavar="RECIPE", help="a Python file, or the name of a recipe: sd15_laion ...")
    add(
        "--variant",
        choices=("full", "smoke"),
        default="full",
        help="smoke is over in minutes, most of which is compiling (default: %(default)s)",
    )
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change values of the recipe, such as steps=100 optim.lr=1e-4 data.0.path=shards",
    )


def _add_toyworld(commands: Any) -> None:
    add = _add_command(commands, "toyworld", "draw an inhabitant of the embedded model's world, to play with")
    add("--class", dest="class_name", choices=CLASSES, metavar="CLASS", help=one_of(CLASSES))
    add(
        "--instance",
        type=integer(0, 2**63 - 1),
        metavar="ID",
        help="which individual (default: one the model never saw, by the seed)",
    )
    add("--scene", choices=SCENES, default="studio", metavar="SCENE", help=one_of(SCENES))
    add("--style", choices=STYLES, default="flat", metavar="STYLE", help=one_of(STYLES))
    add("--accessory", choices=ACCESSORIES, default="none", metavar="THING", help=one_of(ACCESSORIES))
    add("--seed", type=integer(0, _MAX_SEED), default=0, help="of position, scenery and choice (default: 0)")
    add(
        "--size",
        type=integer(16, 1024),
        default=32,
        metavar="PIXELS",
        help="side the picture is drawn at; even (default: %(default)s, the model's own)",
    )
    add(
        "--scale",
        type=integer(1, 64),
        default=8,
        metavar="N",
        help="enlarge the drawn picture without smoothing, which `personalize` undoes exactly (default: %(default)s)",
    )
    add("--out", type=Path, required=True, metavar="PNG", help="the file to write")
    _add_overwrite(add)


def _add_info(commands: Any) -> None:
    add = _add_command(commands, "info", "say versions, devices and cache folders, or what a concept file holds")
    add("file", nargs="?", metavar="FILE", help="a concept.safetensors")
    add("--words", action="store_true", help="list the words that the embedded model knows, one a line, and no more")
