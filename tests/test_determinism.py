"""`--deterministic`: programs for GPUs get XLA's options for it, are compiled apart, and results say so."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from line_task import run, settings

from datencoder_jax import api
from datencoder_jax.cli import main
from datencoder_jax.compilation import Program, dry_run
from datencoder_jax.runtime.target import (
    Target,
    determinism_options,
    deterministic_operations,
    is_deterministic,
    lowering_for,
)
from datencoder_jax.training import checkpoints, stages

pytest_plugins = ("cli_fixtures",)

HOPPER, AMD, CPU, TPU = Target("cuda", (9, 0)), Target("rocm"), Target("cpu"), Target("tpu")
PICTURE = np.zeros((32, 32, 3), np.uint8)


@pytest.mark.parametrize("gpu", [HOPPER, AMD])
def test_gpus_get_xlas_options_within_the_context_alone(gpu):
    assert gpu.compiler_options() == {}
    with deterministic_operations():
        assert gpu.compiler_options()["xla_gpu_deterministic_ops"] is True
        with lowering_for(gpu):
            assert determinism_options() == gpu.compiler_options()
    with lowering_for(gpu):
        assert determinism_options() == {} == gpu.compiler_options()


@pytest.mark.parametrize("other", [CPU, TPU])
def test_other_devices_are_compiled_for_as_ever(other):
    before = other.compiler_options()
    with deterministic_operations(), lowering_for(other):
        assert other.compiler_options() == before and determinism_options() == {}


def test_an_inner_context_does_not_switch_an_outer_one_off():
    with deterministic_operations(), deterministic_operations(False):
        assert is_deterministic()
    with deterministic_operations(False):
        assert not is_deterministic()


def test_xla_knows_the_options():
    options = dict(deterministic_options_of(HOPPER))
    assert jax.jit(lambda x: x + 1).lower(jnp.ones(2)).compile(options)(jnp.ones(2)).tolist() == [2, 2]


def deterministic_options_of(target):
    with deterministic_operations():
        return target.compiler_options()


def test_a_program_is_compiled_apart(monkeypatch):
    program, options = Program("adding", lambda x: x + 1), []
    monkeypatch.setattr(Target, "compiler_options", lambda self: options.append(is_deterministic()) or {})
    for _ in range(2):
        program(jnp.ones(2), quiet=True)
        with deterministic_operations():
            program(jnp.ones(2), quiet=True)
    assert options == [False, True] and program.compilations == 2


class Begun(Exception):
    """The first program of a call was reached."""


@pytest.mark.parametrize("asked", [False, True])
def test_calls_in_python_take_the_option(pipeline, asked):
    def stop(program, args, kwargs):
        raise Begun(is_deterministic())

    for call in (
        lambda: api.personalize(pipeline, PICTURE, method="lora", word="robot", deterministic=asked),
        lambda: api.generate(pipeline, ["a robot"], deterministic=asked),
    ):
        with dry_run(stop), pytest.raises(Begun) as begun:
            call()
        assert begun.value.args == (asked,) and not is_deterministic()


@pytest.mark.parametrize("options", [[], ["--deterministic"]])
def test_commands_pass_the_option_on_and_report_it(calls, tmp_path, picture, options):
    out = tmp_path / "out"
    main(["personalize", str(picture), "--out", str(out), *options])
    expected = {"deterministic": True} if options else {}
    for name in ("personalize", "generate"):
        assert {k: v for k, v in calls[name][1].items() if k == "deterministic"} == expected
    assert json.loads((out / "report.json").read_text())["deterministic"] is bool(options)
    main(["generate", "--prompt", "a fish", "--out", str(tmp_path / "drawn"), *options])
    assert {k: v for k, v in calls["generate"][1].items() if k == "deterministic"} == expected
    assert json.loads((tmp_path / "drawn/report.json").read_text())["deterministic"] is bool(options)


@pytest.mark.parametrize("options", [[], ["--deterministic"]])
def test_pretraining_runs_with_the_option(monkeypatch, tmp_path, options):
    seen = []
    monkeypatch.setattr(stages, "run_stage", lambda *_, **__: seen.append(is_deterministic()))
    main(["pretrain", "--config", "toyworld_vae", "--workdir", str(tmp_path / "work"), *options])
    assert seen == [bool(options)] and not is_deterministic()


def test_the_training_step_and_its_checkpoints_know_of_it(monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(Target, "compiler_options", lambda self: compiled.append(is_deterministic()) or {})
    with deterministic_operations():
        run(tmp_path, steps=2)
        assert checkpoints.describe(settings(), {})["deterministic"] is True
    assert compiled == [True]
    assert checkpoints.describe(settings(), {})["deterministic"] is False
