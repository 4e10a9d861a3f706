"""What a run says of itself: `metrics.jsonl`, curves for TensorBoard where it is installed, and a line of progress.

Only process 0 writes. A run that goes on from a checkpoint first drops what was written after it, so that in the end
the file is that of a run which was never interrupted, but for the times in it.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

FILE = "metrics.jsonl"
TIMES = ("time", "images_per_second", "mfu")
"""Values that differ between two runs of one recipe."""


class Logbook:
    """Records of a run.

    Args:
        workdir: where `metrics.jsonl` and `tensorboard/` are.
        first: the step the run goes on from; None for a run that begins.
        steps: the last one.
    """

    def __init__(self, workdir: Path, first: int | None, steps: int):
        self.quiet = jax.process_index() > 0
        self.path, self._curves = workdir / FILE, None
        self.bar = tqdm(total=steps, initial=first or 0, mininterval=5, smoothing=0.05, disable=self.quiet)
        if self.quiet:
            return
        self._go_on_from(first)
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return
        folder = str(workdir / "tensorboard")
        self._curves = SummaryWriter(folder, purge_step=None if first is None else first + 1)

    def _go_on_from(self, first: int | None) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_bytes().splitlines():
            try:
                step = json.loads(line)["step"]
                before = first is not None and step <= first
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # a crash left half a line, or bytes that are no text
            if before:
                kept.append(line + b"\n")
        aside = self.path.with_name(f".{FILE}")
        aside.write_bytes(b"".join(kept))
        aside.replace(self.path)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Writes the metrics of a step and shows some of them beside the bar."""
        shown = {name: f"{values[name]:.4g}" for name in ("loss", "images_per_second", "mfu") if name in values}
        self.bar.set_postfix(shown, refresh=False)
        self._write(step, values)

    def preview(self, step: int, scores: dict[str, float], picture: Path) -> None:
        """Writes a preview's scores, and its picture to TensorBoard."""
        self._write(step, {f"preview/{name}": value for name, value in scores.items()})
        self.say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        if self._curves and picture.exists():
            from PIL import Image

            with Image.open(picture) as image:
                grid = np.asarray(image.convert("RGB"))
            self._curves.add_image("preview", grid, step, dataformats="HWC")

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if not self.quiet:
            self.bar.write(line)

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if self.quiet:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        if self._curves:
            for name, value in values.items():
                self._curves.add_scalar(name, value, step)

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self._curves:
            self._curves.close()
