"""Deterministic operations, in the text that XLA compiles for a GPU that is not there."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

import datencoder_jax
from datencoder_jax.compile_ahead import without_weights
from datencoder_jax.plan.devices import find_machine
from datencoder_jax.plan.dry_run import record_programs
from datencoder_jax.runtime.target import deterministic_operations, lowering_for


def count_sorts(traced, machine):
    return len(re.findall(r" sort\(", traced.lower().compile(machine.compiler_options()).as_text()))


@pytest.mark.parametrize("enabled", [False, True])
def test_rows_that_are_added_to_a_table_are_sorted_first(enabled):
    machine = find_machine("H100")
    place = SingleDeviceSharding(machine.devices[0])
    shapes = ((5000, 768), jnp.float32), ((308,), jnp.int32), ((308, 768), jnp.float32)
    arguments = [jax.ShapeDtypeStruct(shape, kind, sharding=place) for shape, kind in shapes]
    with lowering_for(machine.target), deterministic_operations(enabled):
        traced = jax.jit(lambda table, rows, values: table.at[rows].add(values)).trace(*arguments)
        assert bool(count_sorts(traced, machine)) == enabled


@pytest.mark.parametrize("method", ["datencoder", "lora"])
def test_every_program_of_personalize_compiles(method):
    """XLA refuses programs with operations that it has no deterministic version of."""
    machine = find_machine("H100")
    pipeline = without_weights(datencoder_jax.load(dtype="bfloat16", compute_dtype="bfloat16"))
    for program in record_programs(pipeline, machine.devices[0], method=method, word="robot"):
        with deterministic_operations():
            program.traced.lower().compile(machine.compiler_options())
