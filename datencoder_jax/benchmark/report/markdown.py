"""The report as Markdown; plots and pictures are links to files beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from datencoder_jax.benchmark.report.document import (
    VERDICTS,
    Block,
    Command,
    Goals,
    Lead,
    Named,
    Pairs,
    Section,
    goal_details,
    measured,
    title,
)
from datencoder_jax.benchmark.report.pictures import Gallery
from datencoder_jax.benchmark.report.results import Results
from datencoder_jax.benchmark.report.tables import Cell, Line, Table

PLOTS = "plots"


def markdown(results: Results, content: Sequence[Section]) -> str:
    """The whole file."""
    parts = [f"# {_text(title(results))}", _text(measured(results))]
    for section in content:
        parts.append(f"## {section.title}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    match block:
        case str():
            return _text(block)
        case Table():
            return _table(block)
        case Named(name, plot):
            return f"![{_text(plot.caption)}]({PLOTS}/{name}.svg)\n\n{_text(plot.caption)}"
        case Gallery():
            return f"### {_text(block.title)}\n\n![pictures: {_text(block.title)}]({PLOTS}/{block.name}.png)"
        case Lead(text):
            return f"**{_text(text)}**"
        case Command(text):
            fence = "`" * (1 + max([2, *(len(run) for run in re.findall("`+", text))]))
            return f"{fence}sh\n{text}\n{fence}"
        case Goals(goals):
            return "\n".join(
                f"- {VERDICTS[goal.get('met')][1]}: {_text(str(goal.get('text', '')))}"
                + "".join(f" ({_text(detail)})" for detail in goal_details(goal))
                for goal in goals
            )
        case Pairs(pairs):
            lines = []
            for term, meaning in pairs:
                several = isinstance(meaning, list)
                lines.append(f"- **{_text(term)}**: {'' if several else _text(str(meaning))}".rstrip())
                lines += [f"  - {_text(item)}" for item in meaning] if several else []
            return "\n".join(lines)
        case _:
            return "\n".join(
                f"- {_text(figure.label)}: {_cell(figure.cell)}{f'; {figure.note}' if figure.note else ''}"
                for figure in block
            )


def _table(table: Table) -> str:
    head = ["", *(["steps"] if table.with_steps else []), *(_text(name) for name in table.head)]
    rule = ["---", *(["---:"] if table.with_steps else [])]
    rule += ["---" if name in table.words else "---:" for name in table.head]
    lines = [line for section in table.sections for line in section] + list(table.apart)
    body = [_line(line, table) for line in lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *body))


def _line(line: Line, table: Table) -> list[str]:
    label = _text(line.label)
    if any(line is other for other in table.apart):
        label = f"_{label}_"
    steps = [] if not table.with_steps else ["" if line.steps is None else str(line.steps)]
    return [f"**{label}**" if line.main else label, *steps, *(_cell(cell) for cell in line.cells)]


def _cell(cell: Cell) -> str:
    text = f"{cell.text} {cell.interval}".rstrip()
    match cell.mark:
        case "best":
            return f"**{cell.text}**{f' {cell.interval}' if cell.interval else ''}"
        case "tie":
            return f"≈ {text}"
        case "better" | "worse" | "undecided":
            return f"{text} {cell.mark}"
        case _:
            return _text(text)


def _text(text: str) -> str:
    """Text on one line, with what Markdown would read as its own signs kept as they are."""
    return re.sub(r"([\\`*_|<>#])", r"\\\1", " ".join(text.split()))
