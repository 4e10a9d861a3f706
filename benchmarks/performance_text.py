"""The text of docs/performance.md, from the measurements of `performance_page.py`."""

from pathlib import Path

INTRODUCTION = """# Performance, by the compilers' count

Made by `benchmarks/performance_page.py`; do not edit. Nothing on this page ran on an accelerator: XLA compiled the
programs for devices that were not there. It tells memory, the kernels that run and the bytes they move. The arithmetic
is counted on the traced programs. A time is the larger of arithmetic and traffic at the chip's published peaks, which
no program reaches. [`datencoder check`](check.md) measures the same on a real device.
"""


def read_compiled(tables: list[Path]) -> list[dict]:
    """The rows of the tables that `make test-accelerators` writes."""
    rows = []
    for table in tables:
        lines = [line.strip("|").split("|") for line in table.read_text("utf-8").splitlines()]
        header, _, *cells = ([cell.strip() for cell in line] for line in lines)
        rows += [dict(zip(header, row, strict=True)) for row in cells]
    return rows


def render_page(content: dict) -> str:
    """The page, with a section for every part that was measured."""
    parts = (
        ("work", _work),
        ("attention", _attention),
        ("programs", _programs),
        ("compiling", _compiling),
        ("training", _training),
        ("plans", _plans),
        ("compiled", _compiled),
    )
    sections = [render(content[part]) + _made(content, part) for part, render in parts if content.get(part)]
    return "\n".join([INTRODUCTION, _goals(content), *sections])


def _goals(content: dict) -> str:
    """What was aimed at, beside what was measured, as far as it is there."""
    lines = []
    if rows := content.get("work"):
        lines.append(["arithmetic against the least possible", "1.05 at most", f"{max(r['ratio'] for r in rows):.3f}"])
    for row in content.get("programs", ()):
        if (row["device"], row["model"], row["setting"], row["program"]) == ("H100", "1.5", 0, "tuning"):
            own = f"{(row['arguments'] + row['temporaries']) / 1e9:.1f} GB"
            both = f"{own} ({row['memory'] / 1e9:.1f} GB with the networks beside it)"
            lines.append(["12 tuning steps of 8 draws, 1.5, H100: arguments and work", "10 GB at most", both])
    for row in content.get("training", ()):
        if row["device"].startswith("v5e"):
            rate = f"{row['images_per_second_per_device']:.1f} images/s, by {row['limit']}"
            lines.append([f"training step of {row['recipe']}, {row['device']}", "18 images/s a chip, by compute", rate])
    for row in content.get("compiling", ()):
        goal = {"1.5": 120, "XL": 300}[row["model"]]
        took = f"{row['seconds']:.0f} s" + (" (missed)" if row["seconds"] > goal else "")
        label = f"compiling a first run of {row['model']} for {row['device']}, {row['threads']} cores"
        lines.append([label, f"{goal} s at most", took])
    return f"## Goals\n\n{_table(['what', 'goal', 'measured'], lines)}"


def _made(content: dict, part: str) -> str:
    return f"\nMade with {content['made'][part]}.\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)) + "\n"


def _work(rows: list[dict]) -> str:
    cells = [
        [
            *(row[name] for name in ("model", "method", "program")),
            *(f"{row[name] / 1e12:.1f}" for name in ("work", "least")),
            f"{row['ratio']:.3f}",
        ]
        for row in sorted(rows, key=lambda row: (row["model"], row["method"], row["program"]))
    ]
    text = """## Arithmetic against the least possible

Twelve tuning steps of 8 draws, and 25 denoising steps with guidance (16 images; 4 for XL). The least is counted from
the UNet's configuration alone (`datencoder_jax/plan/least_work.py`): its forward pass and the gradient by its input,
for one path or two, no gradient of a frozen weight, every prompt once. XL recomputes its forward pass in the gradient,
which its least has too. A ratio below 1 comes from the zero padding of convolutions, which the least counts, and from
layers before the first adapter, which need no gradient.
"""
    return f"{text}\n{_table(['model', 'method', 'program', 'TFLOP', 'least', 'ratio'], cells)}"


def _attention(rows: list[dict]) -> str:
    def number(value: float | None, unit: float) -> str:
        return "does not fit" if value is None else f"{value / unit:,.1f}"

    cells = [
        [row["device"], row["attention"], row["implementation"], number(row["memory"], 1e6), number(row["moved"], 1e9)]
        for row in rows
    ]
    text = """## Attention

Forward and gradient of one layer, batch 8, bfloat16. What `attend` chooses stands in its docstring; before it, TPUs had
`blocks` from 4,096 x 4,096 on and `xla` below, and GPUs had `cudnn`, whose gradient did not compile for 77 keys.
`tests/test_dot_product_attention.py` holds all of them to the numbers of `xla`.
"""
    return f"{text}\n{_table(['device', 'layer', 'implementation', 'memory, MB', 'moved, GB'], cells)}"


def _programs(rows: list[dict]) -> str:
    cells = [
        [row["device"], row["model"], f"`--memory {row['setting']}`" if row["setting"] else "chosen", *_described(row)]
        for row in rows
    ]
    text = """## Personalizing and drawing

The programs of `personalize` with the tuning-encoder (12 steps) and of drawing a full batch, weights in bfloat16; 1.5
at 512 px, others at their own size. Memory is of the device while the program runs: its arguments, its work, and
networks that lie beside it. The least that has to be moved is every operand and result of the matrix products,
convolutions and fused attentions once, as if all else were fused into these.
"""
    table = _table(["device", "model", "setting", *_DESCRIPTION], cells)
    return f"{text}\n{table}"


def _compiling(rows: list[dict]) -> str:
    text = """## Compiling a first run

Seconds from the start until every program is compiled that a first `personalize` with the tuning-encoder runs: tracing
in one thread, compiling in others, as `datencoder personalize` does, and with XLA's own effort. (The tables above have
the seconds of each program by itself, with the effort O0.) Kernels are not tuned by timing, which needs the device.
"""
    cells = [
        [row["device"], row["model"], *(str(row[name]) for name in ("programs", "threads"))]
        + [f"{row[name]:.0f}" for name in ("traced_seconds", "seconds")]
        for row in rows
    ]
    table = _table(["device", "model", "programs", "threads", "tracing, s", "all, s"], cells)
    return f"{text}\n{table}{_FASTER}"


_FASTER = """
What decides is the compilation of tuning, most of which takes one core: XLA's search for fusions, and code for those it
found. Without its rewriting of softmax and norms (`xla_disable_hlo_passes=triton-softmax-rewriter`) sampling of 1.5
compiles in 22 s in place of 33, moves 5 % more and has 12 % more kernels: it is left on, since compiled programs are
cached.

Tuning runs the transformer blocks of XL that follow one another, up to ten, as a scan over a stacked copy of their
weights: the table has its seconds. With every block written out it took 372 s in the same hour as 215 with a version
that scanned the rows of ten blocks alone, and 196 with every program so. On an H100 tuning takes 4.4 GB more for the
copy (18.9 GB, in the plan below, in place of 14.5), moves 5.4 % more and has 25 % more kernels, which cut a block's
weights out of the stack. Drawing would move 7.5 % more, for every picture drawn, so its blocks stay written out.
Where memory is short tuning's do too (`--memory 8`, `16` and `24`).
"""
_DESCRIPTION = ["program", "memory, GB", "arguments", "work", "fused attention", "TFLOP", "moved, GB", "least"]
_DESCRIPTION += ["kernels", "ms at least", "bound by", "compile, s"]


def _described(row: dict) -> list[str]:
    forward, backward = row["fused"]
    return [
        row["program"],
        f"{row['memory'] / 1e9:.2f}",
        f"{row['arguments'] / 1e9:.2f}",
        f"{row['temporaries'] / 1e9:.2f}",
        f"{forward} + {backward}" if forward else "",
        f"{row['work'] / 1e12:.3g}",
        f"{row['moved'] / 1e9:,.3g}",
        f"{row['least_moved'] / 1e9:,.3g}" if "least_moved" in row else "",
        f"{row['kernels']:,}",
        f"{1e3 * row['least_seconds']:,.3g}",
        row["limit"],
        f"{row['compile_seconds']:.0f}",
    ]


def _training(rows: list[dict]) -> str:
    cells = [
        [
            row["device"],
            row["recipe"],
            *_described(row)[1:],
            f"{row['images_per_second_per_device']:.1f}",
            ", ".join(f"{count} {kind}" for kind, (count, _) in row["collectives"].items()),
        ]
        for row in rows
    ]
    header = ["device", "recipe", *_DESCRIPTION[1:], "images/s a device at most", "collectives"]
    text = """## Pretraining

One step at 8 images a device; images/s by the larger of arithmetic and traffic. Programs are compiled with the effort
O0, as plans are: XLA takes several times as long for a TPU with its own.
"""
    return f"{text}\n{_table(header, cells)}"


def _plans(rows: list[dict]) -> str:
    text = """## Plans

What `datencoder plan` prints; [Will it fit?](plan.md) tells how to read it. Compiling took longer than it would have
alone: other work ran beside it.
"""
    return text + "".join(f"\n### `{row['command']}`\n\n{_as_markdown(row['text'])}" for row in rows)


def _as_markdown(text: str) -> str:
    """A plan whose table is one of Markdown with an empty line before it; any other as it stands."""
    lines = text.strip().splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith("|")), None)
    lines = ["```", *lines, "```"] if first is None else [*lines[:first], "", *lines[first:]]
    return "\n".join(lines) + "\n"


def _compiled(rows: list[dict]) -> str:
    rows = sorted(rows, key=lambda row: (row["device"], row["program"]))
    text = """## What `make test-accelerators` compiles

Every method on the embedded model, Stable Diffusion 1.5 with all there is of the device's memory and with
`--memory 8`, the training step of every recipe and its previews, the scores of the evaluation. A program that several
methods share has one row. Memory and traffic are of one device. It took 47 minutes on two cores that ran other tests
beside it, without the previews, which were compiled by themselves; the seconds of compiling are inflated alike.
"""
    return f"{text}\n{_table(list(rows[0]), [list(row.values()) for row in rows])}"
