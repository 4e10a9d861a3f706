"""The report of an evaluation: `metrics.json` as a page, a Markdown file and drawings."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tqdm import tqdm

from datencoder_jax.benchmark.report.document import sections
from datencoder_jax.benchmark.report.markdown import PLOTS, markdown
from datencoder_jax.benchmark.report.page import page
from datencoder_jax.benchmark.report.pictures import galleries, sheet
from datencoder_jax.benchmark.report.plots import draw
from datencoder_jax.benchmark.report.results import read_results
from datencoder_jax.checkpoints.atomic import write_all


def write_report(folder: str | Path) -> None:
    """Writes `report.html`, `report.md` and `plots/` beside `metrics.json` and the sheets of pictures it names.

    The page holds all it shows; the Markdown file links to the drawings in `plots/`. Without matplotlib there are no
    plots, and the report says so; sheets that are missing or damaged leave their pictures out. The same input gives the
    same bytes.

    Args:
        folder: of the evaluation.

    Raises:
        UserError: `metrics.json` cannot be read, or the report not be written.
    """
    results = read_results(Path(folder))
    with tqdm(total=4, desc="report", unit="part") as progress:
        plots = draw(results)
        progress.update()
        shown = galleries(results)
        drawings = {f"{name}.svg": partial(_write, text=plot.svg) for name, plot in (plots or {}).items()}
        drawings |= {f"{gallery.name}.png": partial(_save, gallery=gallery) for gallery in shown}
        if drawings:
            write_all(results.folder / PLOTS, drawings)
        progress.update()
        content = sections(results, plots, shown)
        progress.update()
        texts = {"report.html": page(results, content), "report.md": markdown(results, content)}
        write_all(results.folder, {name: partial(_write, text=text) for name, text in texts.items()})
        progress.update()


def _write(path: Path, text: str) -> None:
    path.write_text(text, "utf-8", errors="backslashreplace")  # names of files may be no Unicode


def _save(path: Path, gallery) -> None:
    sheet(gallery).save(path, format="PNG")
