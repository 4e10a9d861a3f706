"""The page of the corpus: every case with what came of it."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from corpus import KINDS, all_cases
from corpus.case import Case, Outcome, run_case

PAGE = Path(__file__).parents[2] / "docs" / "bad_inputs.md"

_HEAD = """# Bad inputs

People hand wrong things to a program: a picture that a download has cut short, a LoRA of another model, a folder that
is a link to a disk that is away. This table lists {count:,} of them and says what happens with each one. An input is
either *used* as it is meant, with a warning where there is something to say, or *refused* with one sentence. A refusal
leaves no new files behind, and ends the command line with status 2.

A script makes every input, uses it and writes this page:

```
python tools/bad_inputs.py
```

`tests/test_bad_inputs.py` runs the same inputs and compares what happens with this page. The sign … in a sentence
stands for words of Python or of another library, which change with their versions. The middle of long sentences is left
out.
"""

_LONG = 300
"""Letters of a sentence beyond which the middle is left out."""


def run_all(report: Callable[[Case, Outcome], None], words: str = "") -> dict[Case, Outcome]:
    """The outcomes of all cases, or of those with these words in their kind and name; `report` is called after each."""
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="corpus-") as place:
        for number, case in enumerate(all_cases()):
            if words not in f"{case.kind}, {case.name}":
                continue
            folder = Path(place).resolve() / str(number)
            folder.mkdir()
            outcomes[case] = run_case(case, folder)
            report(case, outcomes[case])
    return outcomes


def render(outcomes: Mapping[Case, Outcome]) -> str:
    """The page, in Markdown."""
    parts = [_HEAD.format(count=len(outcomes))]
    for title, kind in KINDS.items():
        rows = [
            f"| {_cell(case.name)} | {outcomes[case].verdict} | {_cell(outcomes[case].sentence)} |"
            for case in kind.cases
        ]
        parts.append(
            f"\n## {title}\n\n{kind.text}\n\n| input | what happens | the sentence |\n|---|---|---|\n"
            + "\n".join(rows)
            + "\n"
        )
    return "".join(parts)


def _cell(text: str) -> str:
    """Text for a cell of a table; what looks like code of Markdown or HTML stays text."""
    if len(text) > _LONG:
        text = f"{text[: _LONG // 2]} [...] {text[-_LONG // 2 :]}"
    for character in "\\|<>*_[]":
        if not (character in "*_<>[]\\" and text.startswith("`")):
            text = text.replace(character, f"\\{character}")
    return text
