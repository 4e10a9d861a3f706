"""The report as one page that needs nothing beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from datencoder_jax.benchmark.report.colours import FAINT, INK, LIGHT, PAPER, RULE, Style, styles
from datencoder_jax.benchmark.report.document import (
    VERDICTS,
    Block,
    Command,
    Figure,
    Goals,
    Lead,
    Named,
    Pairs,
    Section,
    goal_details,
    measured,
    title,
)
from datencoder_jax.benchmark.report.pictures import Gallery, Grid, data_uri
from datencoder_jax.benchmark.report.results import Results
from datencoder_jax.benchmark.report.style import SCRIPT, css
from datencoder_jax.benchmark.report.tables import NOTHING, Cell, Line, Table

_VARIABLES = {INK: "ink", FAINT: "faint", RULE: "rule", PAPER: "paper"} | {c: f"c{k}" for k, c in enumerate(LIGHT)}
_FRAME, _LABEL, _CELL = 90, 240, 94  # pixels around a table, of its first two columns and of each other
_SMALL = 48
_SLIM, _DENSE = 5, 8
"""Columns up to which intervals stand beside their means, not below them; and from which they stand closer."""


def page(results: Results, content: Sequence[Section]) -> str:
    """The whole file."""
    look = styles(results.labels, results.main.label if results.main else None)
    tables = [block for section in content for block in section.blocks if isinstance(block, Table)]
    widest = _FRAME + _LABEL + _CELL * max((len(table.head) for table in tables), default=0)
    links = "".join(f'<a href="#{section.name}">{escape(section.title)}</a>' for section in content)
    body = "\n".join(_section(section, look) for section in content)
    name = escape(title(results))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>\n{css(widest)}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{name}</h1>\n<p>{escape(measured(results))}</p>\n<nav>{links}</nav>\n</header>\n"
        f"<main>\n{body}\n</main>\n<footer></footer>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _section(section: Section, look: Mapping[str, Style]) -> str:
    blocks, plots = [], []
    for block in section.blocks:
        (plots if isinstance(block, Named) else blocks).append(_block(block, look))
    if plots:
        blocks.append(f'<div class="plots">{"".join(plots)}</div>')
    inside = "\n".join(blocks)
    return f'<section id="{section.name}">\n<h2>{escape(section.title)}</h2>\n{inside}\n</section>'


def _block(block: Block, look: Mapping[str, Style]) -> str:
    match block:
        case str():
            return f"<p>{escape(block)}</p>"
        case Table():
            return _table(block, look)
        case Named(name, plot):
            wide = ' class="wide"' if name.startswith("pareto") else ""
            caption = escape(plot.caption)
            drawing = f'<div class="plot">{inline(plot.svg, name, plot.caption)}</div>'
            return f"<figure{wide}>{drawing}<figcaption>{caption}</figcaption></figure>"
        case Gallery():
            return _gallery(block, look)
        case Lead(text):
            return f"<h3>{escape(text)}</h3>"
        case Command(text):
            return f"<pre><code>{escape(text)}</code></pre>"
        case Goals(goals):
            return f'<ul class="goals">{"".join(_goal(goal) for goal in goals)}</ul>'
        case Pairs(pairs):
            return f"<dl>{''.join(_pair(term, meaning) for term, meaning in pairs)}</dl>"
        case _:
            return f'<div class="figures">{"".join(_figure(figure) for figure in block)}</div>'


def inline(svg: str, name: str, caption: str) -> str:
    """A plot as part of the page: in its colours, at its width, with identifiers that no other plot has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    head = f'<svg {box[0] if box else ""} role="img" aria-label="{escape(caption)}"'
    rest = re.sub(r'\bid="([^"]*)"', lambda found: f'id="{name}-{found[1].replace(" ", "-")}"', rest)
    rest = re.sub(r'(href="|url\()#', rf"\1#{name}-", rest)
    rest = re.sub(r"#[0-9a-f]{6}\b", lambda c: f"var(--{_VARIABLES[c[0]]})" if c[0] in _VARIABLES else c[0], rest)
    return f"{head}>{rest}".strip()


def _table(table: Table, look: Mapping[str, Style]) -> str:
    head = ["<th></th>", *(["<th>steps</th>"] if table.with_steps else [])]
    head += [f"<th{_class(_kind(table, k))}>{_label(name)}</th>" for k, name in enumerate(table.head)]
    bodies = "\n".join(
        f"<tbody>{''.join(_line(line, table, look, n > 0) for n, line in enumerate(section))}</tbody>"
        for section in table.sections
        if section
    )
    if table.apart:
        bodies += f'\n<tbody class="apart">{"".join(_line(line, table, look) for line in table.apart)}</tbody>'
    cells = [cell for section in [*table.sections, table.apart] for line in section for cell in line.cells]
    width = max((len(cell.interval) for cell in cells), default=0)
    slim = f' class="slim" style="--width:{width}ch"' if width and len(table.head) <= _SLIM else ""
    slim = slim or _class("dense" if len(table.head) > _DENSE else "")
    start = f'<div class="scroll"><table id="table-{table.name}"{slim}>'
    return f"{start}\n<thead><tr>{''.join(head)}</tr></thead>\n{bodies}\n</table></div>"


def _kind(table: Table, column: int) -> str:
    """How a column is set: "words", "wide" for means with their intervals, or as plain numbers."""
    if table.head[column] in table.words:
        return "words"
    lines = [line for section in [*table.sections, table.apart] for line in section]
    return "wide" if any(line.cells[column].interval for line in lines) else ""


def _line(line: Line, table: Table, look: Mapping[str, Style], again: bool = False) -> str:
    same = again and table.with_steps
    dot = _dot(line.label, look, any(line is other for other in table.apart))
    head = f'<th scope="row" data-v="{escape(line.label)}">{dot}'
    head += f"<span{_class('again' if same else '')}>{_label(line.label)}</span></th>"
    if table.with_steps:
        head += "<td></td>" if line.steps is None else f'<td class="steps" data-v="{line.steps}">{line.steps}</td>'
    cells = "".join(_cell(cell, name in table.words) for cell, name in zip(line.cells, table.head, strict=True))
    steps = "" if line.steps is None else f' data-steps="{line.steps}"'
    return f"<tr{_class('main' if line.main else '')}{steps}>{head}{cells}</tr>\n"


def _cell(cell: Cell, words: bool) -> str:
    names = " ".join(name for name in (cell.mark, "words" if words else "") if name)
    text = escape(cell.text) if words else _number(cell.text)
    text = f"<b>{text}</b>" if cell.mark == "best" else text
    if cell.interval:
        text += f"<small>{_number(cell.interval)}</small>"
    elif cell.text == NOTHING and not words:
        text += "<small></small>"  # keeps the place of an interval
    if cell.mark in ("better", "worse", "undecided", "absent"):
        text += f"<i>{'' if cell.mark == 'absent' else cell.mark}</i>"
    value = "" if cell.number is None else f' data-v="{cell.number:.6g}"'
    return f"<td{_class(names)}{value}>{text}</td>"


def _number(text: str) -> str:
    """Text of numbers, with minus signs in the place of hyphens."""
    return escape(re.sub(r"-(?=[\d.])", "−", text))


def _figure(figure: Figure) -> str:
    small = "<br>".join(part for part in (_number(figure.cell.interval), escape(figure.note)) if part)
    text = _number(figure.cell.text)
    return f"<div><small>{escape(figure.label)}</small><b>{text}</b><small>{small}</small></div>"


def _goal(goal: Mapping) -> str:
    name, sign = VERDICTS[goal.get("met")]
    numbers = "".join(f"<small>{_number(detail)}</small>" for detail in goal_details(goal))
    return f'<li class="{name}"><b>{sign}</b><span>{escape(str(goal.get("text", "")))}</span>{numbers}</li>'


def _pair(term: str, meaning: str | list[str]) -> str:
    if isinstance(meaning, list):
        meaning = f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in meaning)}</ul>"
    else:
        meaning = escape(meaning)
    return f"<dt>{escape(term)}</dt><dd>{meaning}</dd>"


def _gallery(gallery: Gallery, look: Mapping[str, Style]) -> str:
    opened = " open" if gallery.first else ""
    grids = "\n".join(_grid(grid, gallery.prompts, look) for grid in gallery.grids)
    return f'<details id="{gallery.name}"{opened}><summary>{escape(gallery.title)}</summary>\n{grids}\n</details>'


def _grid(grid: Grid, prompts: Sequence[str], look: Mapping[str, Style]) -> str:
    given = _tile(grid.given, f"input picture of {grid.subject}") if grid.given is not None else ""
    heads = "".join(f'<th scope="col">{escape(prompt)}</th>' for prompt in prompts)
    rows = ""
    for row, tiles in grid.rows:
        cells = ""
        for prompt, tile in zip(prompts, tiles, strict=True):
            alt = f"{row.label}: {prompt}"
            cells += f"<td>{_tile(tile, alt) if tile is not None else '<div class=none>none</div>'}</td>"
        rows += (
            f'<tr><th scope="row">{_dot(row.label, look, row.kind != "method")}{_label(row.label)}</th>{cells}</tr>\n'
        )
    return (
        f'<div class="subject"><figure>{given}<figcaption>{escape(grid.subject)}</figcaption></figure>'
        f'<div class="tiles"><table>\n<thead><tr><th></th>{heads}</tr></thead>\n<tbody>{rows}</tbody>\n'
        "</table></div></div>"
    )


def _tile(tile, alt: str) -> str:
    small = _class("small" if len(tile) <= _SMALL else "")
    return f'<img{small} src="{data_uri(tile)}" alt="{escape(alt)}">'


def _label(label: str) -> str:
    """A method's name, which may be broken after its signs where there is little room."""
    return re.sub(r"([_:,])(?=.)", r"\1<wbr>", escape(label, quote=False))


def _dot(label: str, look: Mapping[str, Style], apart: bool = False) -> str:
    """A method's colour, a ring for a reference, nothing for anything else."""
    if label not in look:
        return '<span class="dot ref"></span>' if apart else ""
    return f'<span class="dot" style="--c:var(--c{look[label].hue})"></span>'


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""
