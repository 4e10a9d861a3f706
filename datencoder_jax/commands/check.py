"""`datencoder check`: whether this device computes what it should, and how fast."""

import json
from argparse import Namespace
from functools import partial
from pathlib import Path

from datencoder_jax.checkpoints.atomic import write_all
from datencoder_jax.commands.shared import announce_device, say
from datencoder_jax.data.writing import check_writable


def run(args: Namespace) -> None:
    """Prints a table, and writes `check.json` and `check.md`.

    Raises:
        SystemExit: with status 1, if a comparison or a part fails.
    """
    out = check_writable(args.out)
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
            texts = {"check.json": json.dumps(content, indent=1), "check.md": f"{ROW_HEADER}\n{format_row(parts)}"}
            write_all(out, {name: partial(_write_text, text=f"{text}\n") for name, text in texts.items()})
    say(format_table(parts))
    say(f"{'passed' if content['passed'] else 'FAILED'}; wrote check.json and check.md to {out}")
    if not content["passed"]:
        raise SystemExit(1)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
