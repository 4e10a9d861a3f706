"""Programs that compile in the background before a run needs them: all of them, and with the same results."""

import gc
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import pictures

from datencoder_jax import api, compilation
from datencoder_jax.compile_ahead import compiling_ahead
from datencoder_jax.methods import METHODS

STEPS = 2


def run(pipeline, method="datencoder"):
    word = "cat" if METHODS[method].word is not None else None
    tuned = api.personalize(pipeline, list(pictures(1)), method=method, word=word, steps=STEPS, quiet=True)
    return tuned, api.generate(pipeline, ["a S*"], concept=tuned.concept, num=2, quiet=True)


@pytest.mark.parametrize("method", ["datencoder", "lora", "perfusion"])
def test_a_run_finds_all_its_programs_compiled(pipeline, method, monkeypatch):
    alone = run(pipeline, method)
    compilation.forget_compiled()

    def refuse(*args):
        raise AssertionError("a program was not compiled ahead")

    monkeypatch.setattr(compilation.Program, "_compile", refuse)
    with compiling_ahead(pipeline, lambda hollow: run(hollow, method)) as seconds:
        tuned, made = run(pipeline, method)
    assert seconds > 0
    np.testing.assert_array_equal(tuned.report["losses"], alone[0].report["losses"])
    np.testing.assert_array_equal(made.images, alone[1].images)


def test_a_call_waits_for_what_is_compiling_and_says_so(capsys):
    program, busy = compilation.Program("adding", lambda x: x + 1.0), threading.Event()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(busy.wait)
        program.compile_in_background(executor, jax.ShapeDtypeStruct((3,), jnp.float32))
        threading.Timer(0.3, busy.set).start()
        np.testing.assert_array_equal(program(jnp.zeros(3)), np.ones(3))
    assert re.match(r"waiting for adding \.\.\. compiled in \d+\.\d s", capsys.readouterr().err)
    assert program.compilations == 1 and program.seconds > 0.1


def test_what_is_wrong_with_a_program_is_raised_by_its_call(monkeypatch):
    class Wrong(Exception):
        pass

    def fail(*args):
        raise Wrong

    program = compilation.Program("failing", lambda x: x + 1.0)
    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with ThreadPoolExecutor(1) as executor:
        program.compile_in_background(executor, jax.ShapeDtypeStruct((3,), jnp.float32))
    with pytest.raises(Wrong):
        program(jnp.zeros(3), quiet=True)


def test_programs_that_were_not_begun_when_a_run_failed_compile_in_the_next(pipeline, monkeypatch):
    compilation.forget_compiled()
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt), compiling_ahead(pipeline, run):
        raise KeyboardInterrupt
    tuned, _ = run(pipeline)
    assert len(tuned.report["losses"]) == STEPS


def test_nothing_looks_for_garbage_while_programs_are_traced(pipeline):
    found = []
    with compiling_ahead(pipeline, lambda hollow: found.append(gc.isenabled())):
        assert gc.isenabled()
    assert found == [False]


def test_a_program_that_failed_to_compile_is_compiled_again_by_the_next_call(monkeypatch):
    program, real, failures = compilation.Program("failing once", lambda x: x + 1.0), jax.stages.Lowered.compile, [1]

    def fail_once(*args):
        if failures:
            raise MemoryError(failures.pop())
        return real(*args)

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail_once)
    with ThreadPoolExecutor(1) as executor:
        program.compile_in_background(executor, jax.ShapeDtypeStruct((3,), jnp.float32))
    with pytest.raises(MemoryError):
        program(jnp.zeros(3), quiet=True)
    np.testing.assert_array_equal(program(jnp.zeros(3), quiet=True), np.ones(3))


COMMAND = """
import time
from concurrent.futures import ThreadPoolExecutor
import jax
from datencoder_jax import cli, compilation

program = compilation.Program("slow", lambda x: x)
jax.stages.Lowered.compile = lambda *_: time.sleep(600)
program.compile_in_background(ThreadPoolExecutor(1), jax.ShapeDtypeStruct((3,), "float32"))
cli.main = lambda: 2
while not compilation.is_compiling():
    time.sleep(0.01)
cli.run_and_exit()
"""


def test_the_command_does_not_wait_for_what_nobody_needs():
    assert subprocess.run([sys.executable, "-c", COMMAND], timeout=120).returncode == 2


def test_a_forgotten_program_is_traced_and_compiled_anew():
    traced = []

    def add(x):
        traced.append(1)
        return x + 1.0

    program = compilation.Program("adding", add)
    for _ in range(2):
        program(jnp.zeros(3), quiet=True)
    assert len(traced) == 1
    compilation.forget_compiled()
    program(jnp.zeros(3), quiet=True)
    assert len(traced) == 2 and program.compilations == 2
