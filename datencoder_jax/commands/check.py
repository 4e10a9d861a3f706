"""`datencoder check`: whether this device computes what it should, and how fast."""

import json
from argparse import Namespace
from functools import partial
from pathlib import Path

from datencoder_jax.checkpoints.atomic import write_all
from datencoder_jax.commands.output_folder import check_replaceable, lock_folder, read_json_object
from datencoder_jax.commands.shared import announce_device, say
from datencoder_jax.data.writing import check_writable

_FILES = ("check.json", "check.md")


def run(args: Namespace) -> None:
    """Prints a table, and writes `check.json` and `check.md`.

    Raises:
        SystemExit: with status 1, if a comparison or a part fails.
    """
    out = check_writable(args.out)
    with lock_folder(out):
        is_check = {"schema", "passed", "parts"} <= read_json_object(out / _FILES[0]).keys()
        check_replaceable(out, "check", _FILES, lambda _: is_check, overwrite=args.overwrite)
        passed = _run_parts(args, out)
    if not passed:
        raise SystemExit(1)


def _run_parts(args: Namespace, out: Path) -> bool:
    """Whether every part passed."""
    announce_device()
    from datencoder_jax.check.report import ROW_HEADER, describe_check, format_row, format_table
    from datencoder_jax.check.run import list_parts, run_parts
    from datencoder_jax.compilation import without_cache

    parts = []
    with without_cache():  # what compiling takes is part of what is measured
        for part in run_parts(list_parts(args.quick), args.minutes):
            parts.append(part)
            # After every part, so that nothing is lost if a later one is interrupted.
            content = describe_check(parts, quick=args.quick, minutes=args.minutes)
            texts = json.dumps(content, indent=1), f"{ROW_HEADER}\n{format_row(parts)}"
            write_all(out, {n: partial(_write_text, text=f"{text}\n") for n, text in zip(_FILES, texts, strict=True)})
    say(format_table(parts))
    say(f"{'passed' if content['passed'] else 'FAILED'}; wrote check.json and check.md to {out}")
    return content["passed"]


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
