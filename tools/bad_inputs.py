"""Runs the corpus of bad input in `tests/corpus` and writes `docs/bad_inputs.md`.

python tools/bad_inputs.py            all inputs
python tools/bad_inputs.py WORDS      those with these words in "KIND, NAME"; nothing is written
"""

import os
import sys
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1"}
sys.path[0] = str(Path(__file__).parent.parent)
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from corpus.case import FAILED, Case, Outcome  # noqa: E402  # pyright: ignore[reportMissingImports]
from corpus.page import PAGE, render, run_all  # noqa: E402  # pyright: ignore[reportMissingImports]

_LINES = 12
"""How many lines of a trace are shown."""


def main(words: str) -> int:
    """Runs it; returns the exit status, 1 where a case fails."""
    faults = 0

    def report(case: Case, outcome: Outcome) -> None:
        nonlocal faults
        if outcome.verdict != case.expected or outcome.written:
            faults += 1
            print(f"{case.kind}, {case.name}: {outcome.verdict} in the place of {case.expected}", file=sys.stderr)
            last = "\n    ".join(outcome.fault.strip().splitlines()[-_LINES:])
            print(f"    {last or outcome.sentence} {outcome.written or ''}", file=sys.stderr)

    outcomes = run_all(report, words)
    verdicts = [outcome.verdict for outcome in outcomes.values()]
    print(f"{len(outcomes)} inputs: {', '.join(f'{verdicts.count(v)} {v}' for v in sorted(set(verdicts)))}")
    if faults or FAILED in verdicts:
        return 1
    if not words:
        PAGE.write_text(render(outcomes), encoding="utf-8")
        print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
