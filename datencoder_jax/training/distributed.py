"""Several processes that train as one: who they are, where they meet, and what happens when one is missing.

JAX's distributed runtime has them meet at a coordinator, process 0. Where a launcher started the processes, JAX finds
out by itself who they are (TPU slices, Slurm, Open MPI, Kubernetes jobs); elsewhere they are told. All of this has to
happen before JAX sets up its devices.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from datencoder_jax.errors import PassingError, UserError, exit_status

TIMEOUT = 300
"""Seconds that processes wait for each other at the start; those of a large job do not start at once."""

HEARTBEAT = 100
"""Seconds after which a silent process counts as dead, and the others are ended."""

GOODBYE = 3600
"""Seconds that processes wait for each other at the end, where process 0 has results to write."""

_ALONE = "or train in this process alone with --processes 1"
_TELL = "say who they are with --coordinator, --processes and --process"


def split_cpu(devices: int) -> None:
    """Makes the CPU so many devices; JAX then uses no other. For before it sets up its devices."""
    split = f"--xla_force_host_platform_device_count={devices}"
    # Ten minutes instead of 40 seconds until a collective gives up: the machine may be busy with something else.
    patient = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {split} {patient}"
    # A collective blocks a thread of the pool that all devices compute in, and a device may wait in several at once:
    # with two threads per device they sometimes wait for each other for ever.
    os.environ.setdefault("NPROC", str(8 * devices))
    os.environ["JAX_PLATFORMS"] = "cpu"


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: int = TIMEOUT,
    heartbeat: int = HEARTBEAT,
) -> None:
    """Joins the processes that train together; alone, it does nothing and waits for nobody.

    Args:
        coordinator: `HOST:PORT` where process 0 is reached by all of them, at a free port of its machine. Without it,
            the launcher's word is taken where there is one; with it, the other two may be left to Slurm or Open MPI.
        processes: how many they are. One alone asks no launcher.
        process: which this one is, from 0 on.
        timeout: seconds that they wait for each other.
        heartbeat: seconds after which one that says nothing counts as dead; the others are then ended by JAX.

    Raises:
        UserError: only a part of it is given, or does not fit together; a launcher is there that JAX cannot ask.
        PassingError: the coordinator cannot be reached, or they do not find each other. Where others do not come in
            time, the process ends with status 1 and a sentence, since JAX would abort it without one.
    """
    if coordinator is None and processes == 1 and not process:
        return
    options: dict[str, Any] = {
        "initialization_timeout": timeout + 60,
        "heartbeat_timeout_seconds": heartbeat,
        "shutdown_timeout_seconds": GOODBYE,
    }
    if coordinator is None and processes is None and process is None:
        found = _detect(os.environ)
        if found is None:
            return
        _start(f"of this {found.name}", timeout, options | found.options)
        return
    if coordinator is not None and processes is None and process is None and (task := _task(os.environ)):
        processes, process = task.processes, task.process
        options |= task.options
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if missing := [name for name, value in given.items() if value is None]:
        has = [name for name in given if name not in missing]
        raise UserError(f"{' and '.join(has)} without {' and '.join(missing)}: several processes need all three.")
    assert coordinator is not None and processes is not None and process is not None
    _check(coordinator, processes, process)
    if process > 0:
        _reach(coordinator, process, timeout)
    else:
        _check_free(coordinator)
        print(f"waiting for {processes} processes at {coordinator}", flush=True)
    options |= {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    _start(f"at {coordinator}", timeout, {"cluster_detection_method": "deactivate"} | options)
    import jax

    if jax.process_count() != processes:
        raise UserError(
            f"Process {process} was told --processes {processes}, the coordinator {jax.process_count()}; "
            "start all of them with the same."
        )


@contextmanager
def joined(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> Iterator[None]:
    """`initialize`, then a block; after an error in it this process ends as soon as Python does.

    JAX would first wait for the other processes to end too, which themselves wait for this one in the midst of a step.
    """
    try:
        initialize(coordinator, processes, process)
        yield
    except SystemExit:  # training that was asked to stop does so in all of them
        raise
    except BaseException as error:
        jax = sys.modules.get("jax")
        if jax and jax.distributed.is_initialized():
            atexit.register(_leave, exit_status(error))  # what is registered last comes first, so before JAX's
        raise


def gather(value: Any) -> list[Any]:
    """What every process gives, in the order of the processes; all have to call it together.

    Args:
        value: anything that JSON holds; it comes back as JSON gives it.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(text)))).tolist()
    # Powers of two, since every size is a program of its own.
    padded = np.zeros(max(64, 1 << (max(lengths) - 1).bit_length()), np.uint8)
    padded[: len(text)] = text
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# --- what a launcher says


class _Launcher(NamedTuple):
    name: str
    options: dict[str, Any]
    processes: int | None = None
    process: int | None = None


def _detect(environ: Mapping[str, str]) -> _Launcher | None:
    """The launcher that started this process as one of several; None where it is alone."""
    if task := _task(environ):
        if task.name == "Open MPI job" and "OMPI_MCA_orte_hnp_uri" not in environ:  # as of Open MPI 5
            raise UserError(f"This Open MPI does not tell where process 0 is; add --coordinator HOST:PORT, {_ALONE}.")
        return task
    if _is_tpu_slice(environ):
        return _Launcher("TPU slice", {})
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "To find the other pods of this Kubernetes job JAX needs `pip install kubernetes`; install it, "
                f"{_TELL}, {_ALONE}."
            )
        return _Launcher("Kubernetes job", {})
    return None


def _task(environ: Mapping[str, str]) -> _Launcher | None:
    """What Open MPI or Slurm say of this process, where they started several."""
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        name, count, index = "Open MPI job", environ["OMPI_COMM_WORLD_SIZE"], environ["OMPI_COMM_WORLD_RANK"]
        alone = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    # An allocation's own script is not started by srun: it is one process, whatever number of tasks was asked for.
    elif "SLURM_STEP_NODELIST" in environ and int(environ.get("SLURM_NTASKS", 1)) > 1:
        name, count, index = "Slurm job", environ["SLURM_NTASKS"], environ["SLURM_PROCID"]
        alone = bool(re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")))
    else:
        return None
    # JAX takes one GPU for each process of a node, by its number there. That is wrong for a process that has the node
    # to itself, and for one that was shown its own GPU only. No numbers: all that are visible.
    shown = environ.get("CUDA_VISIBLE_DEVICES", "")
    own = alone or (shown != "" and "," not in shown)
    return _Launcher(name, {"local_device_ids": []} if own else {}, int(count), int(index))


def _is_tpu_slice(environ: Mapping[str, str]) -> bool:
    """Whether this is a TPU machine that may be one of several."""
    import jax  # which says that TPUs are to be used where it finds their chips

    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if "tpu" not in (platforms or ""):
        return False
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        return "," in hosts or int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1
    return "TPU_SKIP_MDS_QUERY" not in environ  # else Google's metadata server knows the others


# --- meeting


def _check(coordinator: str, processes: int, process: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator {coordinator} is not HOST:PORT, such as 10.0.0.1:1234.")
    if process >= processes:
        raise UserError(f"--process {process} is not one of {processes} processes; they count from 0 on.")


def _reach(coordinator: str, process: int, timeout: float) -> None:
    """Waits until something listens at the coordinator's address."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() >= end:
                raise PassingError(
                    f"Process {process} cannot reach the coordinator at {coordinator} within {timeout:g} s "
                    f"({error.strerror or error}); start process 0 there, or mend --coordinator."
                ) from error
        time.sleep(0.2)


def _check_free(coordinator: str) -> None:
    """JAX would crash on a port that is taken."""
    port = int(coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        said = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"Process 0 cannot be the coordinator at {coordinator} ({said}); name another port.") from error


def _start(where: str, timeout: int, options: dict[str, Any]) -> None:
    """`jax.distributed.initialize`, with a sentence before it would abort the process."""
    import jax

    def give_up() -> None:
        print(
            f"error: Not all processes {where} came within {timeout} s; start all of them with the same command, "
            "and see what the others say.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(exit_status(PassingError()))

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        kind = UserError if isinstance(error, ImportError | ValueError) else PassingError
        said = " ".join(str(error).split()).rstrip(".")
        raise kind(f"The processes {where} do not find each other ({said}); {_TELL}, {_ALONE}.") from error
    finally:
        timer.cancel()
