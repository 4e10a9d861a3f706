"""Doing units: one after the other, or in several processes with a share of the cores each.

A unit that fails leaves a sentence and the run goes on. What was killed at any moment goes on where it was, since a
result is written whole or not at all. The bar counts passes through the UNet, of which a tuning step takes three for
each of its draws, forward and back, and a picture two for each sampling step.
"""

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing

from tqdm import tqdm

from datencoder_jax.benchmark.entries import Row
from datencoder_jax.benchmark.making import make, open_pipeline, open_suite
from datencoder_jax.benchmark.suites import Setup
from datencoder_jax.benchmark.units import Unit, write_error, write_made
from datencoder_jax.errors import UserError

_AHEAD = 4
"""Units handed to each process before it has asked for them."""


def execute(
    setup: Setup,
    units: Sequence[Unit],
    *,
    jobs: int = 1,
    retry_failed: bool = False,
    title: str = "evaluating",
    finished: Callable[[Row], str] | None = None,
) -> None:
    """Does what is not done yet.

    Args:
        units: in the order to do them in.
        jobs: processes.
        retry_failed: also do again what failed.
        title: of the progress bar.
        finished: called as all of a row's units with one seed have been tried; gives a line to print.

    Raises:
        UserError: a process died, or a result cannot be written.
    """
    left = [unit for unit in units if not (unit.file.exists() or (unit.error_file.exists() and not retry_failed))]
    if not left:
        return
    open_parts = Counter((unit.row.name, unit.seed) for unit in left)
    cost = {unit.row.name: _passes(setup, unit.row) for unit in units}
    total, to_do = (sum(cost[unit.row.name] for unit in some) for some in (units, left))
    form = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"  # tqdm begins a postfix with a comma
    count, failing = len(units) - len(left), set()
    with (
        tqdm(desc=title, total=total, initial=total - to_do, bar_format=form, smoothing=0.02) as bar,
        closing(_each(setup, left, min(jobs, len(left)))) as outcomes,
    ):
        bar.set_postfix_str(f"{count}/{len(units)} units")
        for unit, error in outcomes:
            count += 1
            bar.set_postfix_str(f"{count}/{len(units)} units, {unit.row.name}", refresh=False)
            bar.update(cost[unit.row.name])
            if error and unit.row.name not in failing:  # one line tells of all, the report of each
                bar.write(f"{unit.row.name} failed on {unit.name}: {error}")
                failing.add(unit.row.name)
            open_parts[unit.row.name, unit.seed] -= 1
            if finished is not None and not open_parts[unit.row.name, unit.seed]:
                bar.write(finished(unit.row))


def _passes(setup: Setup, row: Row) -> int:
    """Passes through the UNet that a unit takes, about."""
    pictures = len(open_suite(setup.unscored).prompts(0)) * setup.num
    draws = setup.draws or open_pipeline(setup.unscored).memory.draws
    return 2 * setup.sampling_steps * pictures + 3 * draws * row.steps


def _each(setup: Setup, units: Sequence[Unit], jobs: int) -> Generator[tuple[Unit, str | None]]:
    """Does units; gives each as it is done, with why it failed."""
    if jobs <= 1:
        for unit in units:
            yield unit, do(setup, unit)
        return
    share = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, context, _begin, (share, context.Value("i", 0)))
    waiting, running = iter(units), {}
    try:
        for unit in waiting:
            running[pool.submit(do, setup, unit)] = unit
            if len(running) >= _AHEAD * jobs:
                break
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit = running.pop(future)
                if (more := next(waiting, None)) is not None:
                    running[pool.submit(do, setup, more)] = more
                yield unit, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "one of the processes of --jobs died, perhaps for want of memory; run the same command again, with fewer"
        ) from error
    finally:
        # Whatever they are doing is done again by whoever goes on; those that are done end by themselves.
        pool.shutdown(wait=not running, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()


def do(setup: Setup, unit: Unit) -> str | None:
    """Does one unit and writes its result; returns why it failed, None if it did not."""
    try:
        made = make(setup.unscored, unit.row, unit.subject, unit.seed)
    except Exception as error:
        sentence = " ".join(str(error).split()) or "no reason was given"
        sentence = sentence if isinstance(error, UserError) else f"{type(error).__name__}: {sentence}"
        write_error(unit, sentence[:500])
        return sentence[:500]
    write_made(unit, made)
    return None


def _begin(share: int, taken) -> None:
    """Begins a process: its share of the machine's cores, before JAX counts them, and its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who is interrupted is the process that started it

    def follow() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)  # it was killed, and nobody waits for results

    threading.Thread(target=follow, daemon=True).start()
    with taken.get_lock():
        first, taken.value = taken.value, taken.value + share
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[(first + k) % len(cores)] for k in range(share)})
