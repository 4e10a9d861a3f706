"""`datencoder pretrain` as one of several processes, on the task of the loop's tests; to be interrupted and killed.

What is done beside training stands in the environment, as JSON in `LINE`: `rows`, a folder that is told which rows were
drawn; `process` and `log`, who does `act` at which log: "term", "int", "kill" or "fail"; `pause` seconds at every log;
`differs`, whether each reads data of its own, and `apart`, whether each has a work folder of its own; `heartbeat`
seconds after which a silent process is dead; `timeout` seconds that they wait for each other.
"""

import functools
import json
import os
import signal
import sys
import time
import types
from pathlib import Path

from datencoder_jax.cli import main
from datencoder_jax.errors import UserError
from datencoder_jax.training import distributed

PLAN = json.loads(os.environ.get("LINE", "{}"))


def run_stage(config, workdir, accept_changes=False):
    import jax
    from line_task import Line

    from datencoder_jax.training.loop import fit

    here = jax.process_index()

    def on_batch(step, rows):
        if "rows" in PLAN:
            with (Path(PLAN["rows"]) / f"rows{here}").open("a") as file:
                file.write(f"{step} {rows.start} {rows.stop}\n")

    def on_log(count):
        time.sleep(PLAN.get("pause", 0.0))
        if (PLAN.get("process"), PLAN.get("log")) == (here, count):
            if PLAN["act"] == "fail":
                raise UserError("The data of this process is gone.")
            os.kill(os.getpid(), {"term": signal.SIGTERM, "int": signal.SIGINT, "kill": signal.SIGKILL}[PLAN["act"]])

    if PLAN.get("apart"):
        workdir = workdir.with_name(f"work{here}")
    identity = {"data": str(here)} if PLAN.get("differs") else None
    fit(Line(on_batch=on_batch, on_log=on_log, identity=identity), config, workdir, accept_changes=accept_changes)


if __name__ == "__main__":
    # In place of the real one, whose tasks take longer to import than this one to train.
    sys.modules["datencoder_jax.training.stages"] = stages = types.ModuleType("stages")
    stages.run_stage = run_stage
    seconds = {name: PLAN[name] for name in ("heartbeat", "timeout") if name in PLAN}
    distributed.initialize = functools.partial(distributed.initialize, **seconds)
    sys.exit(main(["pretrain", *sys.argv[1:]]))
