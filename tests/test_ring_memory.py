"""The ring loss at the size of a pod's batch, compiled and not run: what a device needs falls as 1 / devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from datencoder_jax.objectives.contrastive import contrastive_ring
from datencoder_jax.runtime.target import current_target

BATCH, WIDTH, VOCABULARY = 65_536, 768, 49_408


def compiled_bytes(devices):
    """Working memory, arguments and results per device of the compiled mean loss and its gradient."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    rows, replicated = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    shapes = [((BATCH, WIDTH), jnp.float32, rows), ((BATCH,), jnp.int32, rows), ((BATCH,), jnp.bool_, rows)]
    shapes += [((VOCABULARY, WIDTH), jnp.float32, replicated), ((VOCABULARY,), jnp.bool_, replicated)]

    def loss(*case):
        return contrastive_ring(*case, temperature=0.1, neighbours=3, mesh=mesh).mean()

    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype, place in shapes]
    program = (
        jax.jit(jax.value_and_grad(loss))
        .lower(*arguments)
        .compile(compiler_options=current_target().compiler_options())
    )
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes, memory.argument_size_in_bytes, memory.output_size_in_bytes


@pytest.fixture(scope="module")
def measured():
    return {devices: compiled_bytes(devices) for devices in (1, 2, 4, 8)}


def test_working_memory_falls_as_the_devices_grow(measured):
    working = {devices: each[0] for devices, each in measured.items()}
    assert working[1] < 1.6e9  # the similarities alone are 17 GB, those to all words 13 GB
    for devices in (2, 4, 8):
        assert working[devices] < 1.2 * working[1] / devices


def test_so_do_arguments_and_gradient_but_for_the_table(measured):
    table = 4 * VOCABULARY * WIDTH
    for devices, (_, arguments, results) in measured.items():
        assert arguments - table < 1.01 * 4 * BATCH * WIDTH / devices + VOCABULARY
        assert results < 1.01 * 4 * BATCH * WIDTH / devices
