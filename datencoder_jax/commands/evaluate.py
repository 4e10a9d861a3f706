"""`datencoder evaluate`: methods at several numbers of steps on a suite of subjects; a table, scores and pictures."""

from __future__ import annotations

import functools
import os
import shlex
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from datencoder_jax.benchmark.suites import DREAMBENCH, TOYWORLD, Setup
from datencoder_jax.checkpoints.hub import resolve_vision
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.commands.output_folder import check_replaceable, lock_folder
from datencoder_jax.commands.shared import ONLY_TOYS, announce_device, say
from datencoder_jax.data.writing import check_writable
from datencoder_jax.errors import UserError
from datencoder_jax.prompts import check_unicode

SETTINGS = "settings.json"
_WRITTEN = ("metrics.json", "report.md", "report.html", "pictures", "plots", "dreambench_plus")
"""What a run writes beside its settings and units, which it checks by what is in them."""
_DTYPES = {"auto": "auto", "bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def run(args: Namespace) -> None:
    """Does what is not done yet, and writes metrics, pictures and the report from all that is."""
    setup = make_setup(args)
    cautions = find_cautions(setup)
    for sentence in cautions:
        warnings.warn(sentence, stacklevel=1)
    args.out = check_writable(args.out)
    if setup.suite not in (TOYWORLD, DREAMBENCH) and args.out.resolve() == Path(setup.suite).resolve():
        raise UserError(
            f"--out is the folder of the pictures, {setup.suite}; name another one for what is made of them."
        )
    # A report of what is there so far may be asked for while another run goes on.
    with nullcontext() if args.report_only else lock_folder(args.out):
        begun = (args.out / SETTINGS).exists()
        check_replaceable(args.out, "evaluate", _WRITTEN, lambda _: begun, overwrite=args.overwrite)
        _evaluate(args, setup, cautions)


def _evaluate(args: Namespace, setup: Setup, cautions: Sequence[str]) -> None:
    for name in filter(None, (setup.clip, setup.dino)):  # before anything is written
        resolve_vision(name)
    device = announce_device()
    from datencoder_jax.benchmark import rates
    from datencoder_jax.benchmark.entries import make_rows, parse_entries, parse_steps
    from datencoder_jax.benchmark.joining import check_joined, read_joined
    from datencoder_jax.benchmark.metrics import Metrics, make_about, make_frame
    from datencoder_jax.benchmark.run import execute
    from datencoder_jax.benchmark.units import enter, make_units, seeds_of

    rows = make_rows(parse_entries(args.methods), parse_steps(args.steps))
    jobs, others = _jobs(args.jobs), read_joined(args.join)
    seeds = max(args.seeds or (2 if setup.suite == TOYWORLD else 1), seeds_of(args.out))
    command = shlex.join(["datencoder", *sys.argv[1:]])
    device += f", {jobs} jobs" if jobs > 1 else ""
    if others:  # now, and not after hours
        check_joined(make_frame(setup, make_about(setup, seeds, command, device, jobs=jobs)), others)
    work = functools.partial(execute, jobs=jobs, retry_failed=args.retry_failed)
    if args.sweep and not args.report_only:
        enter(args.out, setup, [], seeds)  # what rates are chosen under is what the rows will be made with
        if settled := rates.sweep(args.out, setup, rows, args.sweep, work):
            say(f"no rates are chosen for {', '.join(settled)}, begun without: choose another --out for that")
    chosen = args.rates or (args.out / rates.RATES if (args.out / rates.RATES).exists() else None)
    if chosen is not None:
        rows, missing = rates.with_rates(rows, chosen)
        if missing:
            say(f"{chosen} names no rates for {', '.join(missing)}: the method's own")
    wanted = {row.name for row in rows}
    rows, seeds = enter(args.out, setup, rows, seeds)
    units = make_units(args.out, rows, setup, seeds)
    about = make_about(setup, seeds, command, device, jobs=jobs)
    metrics = Metrics(args.out, setup, rows, units, about, others, cautions)
    for sentence in (*metrics.suite.missing, *metrics.left_out):
        say(sentence)
    try:
        if not args.report_only:
            work(setup, [unit for unit in units if unit.row.name in wanted], finished=metrics.line)
    finally:
        # After an interruption too: the same command goes on, but what there is can be looked at.
        written = write_results(args.out, setup, metrics, units)
        say(f"wrote {', '.join(written)} to {args.out}")


def write_results(folder: Path, setup: Setup, metrics, units) -> list[str]:
    """Writes metrics, pictures, the report, and of photographs the tree of DreamBench++; returns their names."""
    metrics.write()
    written = ["metrics.json", "pictures"]
    if setup.suite != TOYWORLD:
        from datencoder_jax.benchmark.dreambench_plus import NAME, write_tree

        write_tree(folder, setup, units)
        written.append(NAME)
    from datencoder_jax.benchmark.report import write_report

    write_report(folder)
    return [*written, "report.md", "report.html"]


def make_setup(args: Namespace) -> Setup:
    """What the options say of every unit."""
    check_unicode(args.word)
    suite, data = args.suite, args.data
    if suite == DREAMBENCH and data is None:
        raise UserError(
            "--suite dreambench needs the photographs: name the folder of a copy of github.com/google/dreambooth with "
            "--data"
        )
    if suite != DREAMBENCH and data is not None:
        raise UserError(f"--data goes with --suite dreambench, not with {suite}; leave it out.")
    if suite == TOYWORLD and (args.clip or args.dino):
        raise UserError("--clip and --dino score photographs; leave them out with --suite toyworld.")
    if args.sweep and (suite != TOYWORLD or args.split == "development"):
        raise UserError(
            "--sweep chooses rates on development individuals of toyworld, for a table of its test individuals; "
            "elsewhere name chosen rates with --rates"
        )
    if args.sweep and args.rates:
        raise UserError("--sweep chooses learning rates and --rates names chosen ones; leave one of them out.")
    if suite not in (TOYWORLD, DREAMBENCH):
        suite = str(expand_user(suite))
        if not Path(suite).is_dir():
            raise UserError(f"There is no suite and no folder {suite}; choose toyworld, dreambench or a folder.")
    names = ("word", "split", "instances", "model", "encoder", "vision", "memory", "prediction_type", "draws")
    names += ("sampler", "sampling_steps", "guidance", "resolution", "clip", "dino")
    return Setup(
        suite,
        None if data is None else str(expand_user(data)),
        num=args.num or (1 if suite == TOYWORLD else 4),
        dtype=_DTYPES[args.dtype],
        compute_dtype=_DTYPES[args.compute],
        **{name: getattr(args, name) for name in names},
    )


def find_cautions(setup: Setup) -> list[str]:
    """Sentences on what makes the numbers of a run say less than they seem to, for the terminal and the report."""
    return [ONLY_TOYS] if setup.suite != TOYWORLD and setup.model == TOYWORLD else []


def _jobs(jobs: int) -> int:
    from datencoder_jax.runtime.target import current_target

    if jobs > 1 and current_target().platform != "cpu":
        raise UserError("--jobs shares the cores of a CPU; the accelerator is one process's, so leave it out.")
    return min(jobs, os.cpu_count() or 1)
