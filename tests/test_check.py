"""`datencoder check`: every part on the CPU with a tiny model, what fails, what is left out, and what is written."""

import contextlib
import json
import logging
import math
from pathlib import Path

import jax
import jsonschema
import pytest
from cli_helpers import fails

from datencoder_jax import compilation
from datencoder_jax.check import attention, concept, diffusers_baseline, pretraining, reference, report, run, speed
from datencoder_jax.check.part import Comparison, LeftOut, Outcome, Part
from datencoder_jax.check.versions import read_versions
from datencoder_jax.check.workload import Workload, fill_randomly
from datencoder_jax.cli import main
from datencoder_jax.commands.shared import device_name
from datencoder_jax.errors import UserError
from datencoder_jax.plan.shapes import stable_diffusion
from datencoder_jax.runtime import availability
from datencoder_jax.runtime.hardware import CHIPS
from datencoder_jax.runtime.target import Target
from datencoder_jax.training.recipes import load_recipe

ROOT = Path(__file__).parent.parent
SMALL = attention.Shape(5, 3, 2, 8)


@pytest.fixture
def workload(pipeline):
    """The tiny model in place of the embedded one."""
    workload = Workload()
    workload.__dict__["pipeline"] = pipeline
    return workload


@pytest.fixture
def parts(monkeypatch):
    """Quick stand-ins for the parts of the command, which a test may change."""
    functions = {
        "versions": read_versions,
        "attention": lambda: attention.check_attention((SMALL,)),
        "concept": lambda: Outcome({"nearest_word": "robot"}, [Comparison("concept cosine", 0.001, 0.02)]),
        "speed": lambda: Outcome(),
        "pretraining": lambda: Outcome(),
        "diffusers": lambda: Outcome(),
    }
    monkeypatch.setattr(run, "list_parts", lambda quick: functions)
    monkeypatch.setattr(compilation, "without_cache", contextlib.nullcontext)
    return functions


def test_comparison_passes_up_to_the_tolerance():
    assert Comparison("a", 0.1, 0.1).passed and not Comparison("a", 0.11, 0.1).passed
    broken = Comparison("a", math.nan, 1.0)
    assert not broken.passed and broken.to_dict()["deviation"] is None


def test_versions_name_the_device():
    values = read_versions().values
    assert values["platform"] == "cpu" and values["devices"] == 8 and values["packages"]["jax"] == jax.__version__
    json.dumps(values, allow_nan=False)


def test_attention_passes_and_a_wrong_implementation_fails(monkeypatch):
    outcome = attention.check_attention((SMALL,))
    assert len(outcome.comparisons) == 4 * 4 and all(c.passed for c in outcome.comparisons)
    assert set(outcome.values["largest_deviation"]) == {
        "xla bfloat16",
        "blocks bfloat16",
        "blocks float32",
        "heads float32",
    }
    right = attention.attend
    monkeypatch.setattr(
        attention, "attend", lambda q, k, v, implementation: right(q, k, v) * (1.1 if implementation != "xla" else 1.0)
    )
    failed = {c.name.split()[0] for c in attention.check_attention((SMALL,)).comparisons if not c.passed}
    assert failed == {"blocks", "heads"}


def test_attention_checks_what_the_device_can_run():
    assert set(attention.list_implementations(Target("cuda", (9, 0)))) == {"xla", "blocks", "cudnn"}
    assert set(attention.list_implementations(Target("cuda", (7, 5)))) == {"xla", "blocks"}
    assert set(attention.list_implementations(Target("cpu"))) == {"xla", "blocks", "heads"}
    assert set(attention.list_implementations(Target("tpu"))) == {"xla", "blocks", "flash"}
    assert len(attention.choose_shapes(Target("tpu"), quick=True)) < len(attention.choose_shapes(Target("tpu"), False))


def test_concept_is_compared_with_the_reference(pipeline, monkeypatch):
    monkeypatch.setattr(reference, "STEPS", 2)
    content = reference.tune_concept(pipeline) | {"tolerances": reference.TOLERANCES}
    monkeypatch.setattr(concept, "read_reference", lambda: content)
    outcome = concept.check_concept(pipeline)
    assert len(outcome.comparisons) == 3 and all(c.passed for c in outcome.comparisons)
    content |= {"nearest_word": "nothing", "losses": [2 * loss for loss in content["losses"]]}
    content["embedding"] = [-value for value in content["embedding"]]
    assert not any(c.passed for c in concept.check_concept(pipeline).comparisons)


def test_shipped_reference_is_of_this_code():
    content = reference.read_reference()
    assert len(content["losses"]) == content["steps"] == reference.STEPS
    assert content["instance"] == reference.INSTANCE and content["tolerances"] == reference.TOLERANCES
    for name, tolerance in reference.TOLERANCES.items():
        assert 2 * content["bfloat16"][name] < tolerance
    assert content["bfloat16"]["nearest_word"] == content["nearest_word"]


@pytest.mark.slow
def test_embedded_model_makes_the_reference():
    assert all(c.passed for c in concept.check_concept().comparisons)


def test_speed_measures_every_stage_twice(workload, monkeypatch):
    monkeypatch.setattr(speed, "find_chip", lambda device: CHIPS["H100"])
    values = speed.check_speed(workload, steps=2, pictures=2).values
    assert tuple(values["stages"]) == speed.STAGES and values["steps"] == 2
    for stage in values["stages"].values():
        assert stage["tflop"] > 0 and stage["compile_seconds"] > 0
        assert stage["cold_seconds"] > stage["compile_seconds"] and stage["warm_seconds"] > stage["least_seconds"] > 0
        assert stage["share_of_peak"] == pytest.approx(stage["least_seconds"] / stage["warm_seconds"])
    json.dumps(values, allow_nan=False)


def test_share_of_an_unknown_device_is_not_known():
    assert speed.compare_with_peak(2e12, 1.0) == {"tflop": 2.0, "least_seconds": None, "share_of_peak": None}


def test_pretraining_halves_the_batch_until_it_fits(workload, monkeypatch):
    monkeypatch.setattr(pretraining, "SMALL_BATCH", 8)
    real, sizes = pretraining._measure_step, []

    def measure(pipeline, config, batch_size):
        sizes.append(batch_size)
        if batch_size > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return real(pipeline, config, batch_size)

    monkeypatch.setattr(pretraining, "_measure_step", measure)
    outcome = pretraining.check_pretraining(workload)
    assert sizes == [8, 4, 2] and outcome.values["batch"] == 2 and outcome.comparisons[0].passed
    json.dumps(outcome.values, allow_nan=False)
    monkeypatch.setattr(pretraining, "SMALL_BATCH", 0)
    with pytest.raises(LeftOut, match="does not fit"):
        pretraining.check_pretraining(workload)


def test_pretraining_fails_with_other_errors(workload, monkeypatch):
    def measure(*_):
        raise RuntimeError("INTERNAL: no")

    monkeypatch.setattr(pretraining, "_measure_step", measure)
    with pytest.raises(RuntimeError, match="INTERNAL"):
        pretraining.check_pretraining(workload)


def test_pretraining_is_that_of_the_recipe():
    recipe = load_recipe(ROOT / "configs" / "sd15_laion.py", "full", []).to_dict()
    config = pretraining.make_config(False).to_dict()
    del config["mesh"]  # one device
    assert config == {name: recipe[name] for name in config}


def test_random_weights_are_small_and_norms_are_one():
    text = stable_diffusion("1.5", "bfloat16").text
    some = {name: x for name, x in text.params.items() if "layers.0.mlp" in name or "final" in name}
    params = fill_randomly(text.with_params(some)).params
    assert all(params[name].shape == x.shape and params[name].dtype == x.dtype for name, x in some.items())
    for name, values in params.items():
        if "mlp" in name and name.endswith("weight"):
            assert 0.015 < float(values.astype("float32").std()) < 0.025
        else:
            assert (values == float(name.endswith("weight"))).all()


def test_diffusers_runs_the_same_on_the_cpu(pipeline, workload):
    pytest.importorskip("diffusers")
    values = diffusers_baseline.compare_with_diffusers(pipeline, workload.image, "cpu", steps=1, pictures=1).values
    assert set(values["ratio"]) == {"tuning", "drawing"} and all(ratio > 0 for ratio in values["ratio"].values())


def test_diffusers_is_left_out_with_the_reason(workload, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LeftOut, match="torch has no CUDA device"):
        diffusers_baseline.check_diffusers(workload)
    monkeypatch.setattr(diffusers_baseline.importlib.util, "find_spec", lambda name: None if name == "peft" else 1)
    with pytest.raises(LeftOut, match="not installed: peft"):
        diffusers_baseline.check_diffusers(workload)


def test_parts_that_fail_do_not_keep_others_from_running():
    def fail():
        raise UserError("it is broken")

    failed, after = run.run_parts({"a": fail, "b": lambda: Outcome({"x": 1})}, 1)
    assert failed.failure == "UserError: it is broken" and not failed.passed and after.passed


def test_parts_after_the_time_are_left_out():
    seconds = iter([0, 0, 50, 61, 61])
    first, second = run.run_parts({"a": Outcome, "b": Outcome}, 1, clock=lambda: next(seconds))
    assert first.left_out is None and first.seconds == 50
    assert second.left_out and "--minutes" in second.left_out and second.passed


def test_command_lists_every_part():
    assert tuple(run.list_parts(False)) == run.PARTS
    with pytest.raises(LeftOut, match="--quick"):
        run.list_parts(True)["pretraining"]()


def test_command_writes_json_and_a_row(parts, tmp_path, capsys):
    assert main(["check", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "attention     passed" in printed.out and "attention xla in bfloat16" in printed.err
    content = json.loads((tmp_path / "check.json").read_text())
    jsonschema.validate(content, SCHEMA)
    assert content["passed"] and tuple(content["parts"]) == run.PARTS
    header, _, row = (tmp_path / "check.md").read_text().splitlines()
    assert header.count("|") == row.count("|") and jax.__version__ in row and "0.001" in row


def test_command_ends_with_1_where_a_comparison_fails(parts, tmp_path, capsys):
    parts["concept"] = lambda: Outcome({"nearest_word": "fish"}, [Comparison("concept losses", math.nan, 0.1)])
    assert main(["check", "--out", str(tmp_path)]) == 1
    assert "concept losses deviates" in capsys.readouterr().out
    content = json.loads((tmp_path / "check.json").read_text())
    assert not content["passed"] and content["parts"]["attention"]["status"] == "passed"
    jsonschema.validate(content, SCHEMA)


def test_command_leaves_out_all_that_is_late(parts, tmp_path, capsys):
    assert main(["check", "--minutes", "0", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("left out") == len(run.PARTS)
    assert (tmp_path / "check.md").is_file()


def test_command_refuses_in_a_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    fails(capsys, "is a file, not a folder", "check", "--out", tmp_path / "file" / "x")
    fails(capsys, "--minutes", "check", "--minutes", "-1")


def test_help_lists_the_parts(capsys):
    assert main(["check", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*run.PARTS, "--quick", "--minutes", "check.json", "check.md"))


def test_row_has_a_cell_for_every_column():
    stage = {"cold_seconds": 9.0, "compile_seconds": 8.0, "warm_seconds": 1.0, "peak_bytes": 2_000_000_000}
    stage |= {"tflop": 3.0, "least_seconds": 0.5, "share_of_peak": 0.5}
    speeds = {"model": "m", "resolution": 512, "dtype": "bfloat16", "stages": dict.fromkeys(speed.STAGES, stage)}
    filled = [
        Part("speed", Outcome(speeds)),
        Part("pretraining", Outcome(stage | {"batch": 16, "images_per_second": 16.0})),
        Part("diffusers", Outcome({name: {"drawing": 1.5, "tuning": 2.0} for name in RATIO})),
    ]
    row = report.format_row(filled)
    assert row.count("|") == report.ROW_HEADER.splitlines()[0].count("|")
    assert "9 / 1" in row and "50% / 50%" in row and "16: 1" in row and "1.50 / 2.00" in row
    table = report.format_table(filled)
    assert "planned 0.5 s at least, 50% of the peak, peak 2.0 GB" in table and "ratio 1.50" in table


RATIO = ("ratio", "seconds", "diffusers_seconds")
_PART = {
    "type": "object",
    "required": ["status", "seconds", "left_out", "failure", "values", "comparisons"],
    "properties": {
        "status": {"enum": ["passed", "FAILED", "left out"]},
        "seconds": {"type": "number"},
        "values": {"type": "object"},
        "comparisons": {
            "type": "array",
            "items": {
                "required": ["name", "deviation", "tolerance", "passed"],
                "properties": {"deviation": {"type": ["number", "null"]}, "passed": {"type": "boolean"}},
            },
        },
    },
}
SCHEMA = {
    "type": "object",
    "required": ["schema", "datencoder_jax", "date", "quick", "minutes", "passed", "parts"],
    "properties": {"schema": {"const": 1}, "parts": {"additionalProperties": _PART, "required": list(run.PARTS)}},
}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with an NVIDIA GPU whose driver is named, and JAX's package for CUDA or not."""

    def make(driver, plugin):
        version = tmp_path / "version"
        if driver is not None:
            version.write_text(f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build\n")
        monkeypatch.setattr(availability, "_DRIVER_VERSION", version)
        monkeypatch.setattr(availability, "_DEVICE_FILES", ())
        monkeypatch.setattr(availability, "has_cuda_plugin", lambda: plugin)
        monkeypatch.setattr(availability, "has_cuda_libraries", lambda: plugin)
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)

    return make


@pytest.mark.parametrize(
    ("driver", "plugin", "reason"),
    [
        ("550.54.15", False, 'pip install "datencoder_jax[cuda]"'),
        ("470.82.01", True, "its driver 470.82.01 is older than 525"),
        ("550.54.15", True, "CUDA did not start"),
        (None, True, "there is no NVIDIA driver"),
    ],
)
def test_unused_gpu_is_explained(gpu, driver, plugin, reason, caplog, monkeypatch, capsys):
    gpu(driver, plugin)
    with caplog.at_level(logging.WARNING):
        assert device_name().startswith("cpu")
    (record,) = caplog.records
    assert reason in record.message and "JAX_PLATFORMS=cpu" in record.message and "\n" not in record.message
    caplog.clear()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert device_name().startswith("cpu") and not caplog.records


def test_no_gpu_is_not_explained(gpu):
    gpu(None, False)
    assert availability.explain_unused_gpu("cpu") is None and availability.nvidia_driver() is None
    gpu("550.54.15", True)
    assert availability.explain_unused_gpu("gpu") is None


def test_the_compiler_for_plans_alone_is_no_reason_to_expect_a_gpu(gpu, monkeypatch):
    gpu(None, True)
    monkeypatch.setattr(availability, "has_cuda_libraries", lambda: False)
    assert availability.explain_unused_gpu("cpu") is None


ROBOT = str(ROOT / "examples" / "robot.png")


@pytest.mark.parametrize("command", [["info"], ["plan", "--models", "1.5"], ["check"], ["personalize", ROBOT]])
def test_missing_cuda_package_is_a_sentence(gpu, monkeypatch, capsys, tmp_path, command):
    gpu("550.54.15", False)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")

    def no_devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", no_devices)
    out = [] if command[0] in ("info", "plan") else ["--out", tmp_path]
    assert "datencoder_jax[cuda]" in fails(capsys, "JAX_PLATFORMS is cuda", *command, *out)


def test_other_missing_devices_are_a_sentence(gpu, monkeypatch, capsys):
    gpu(None, False)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")

    def no_devices():
        raise RuntimeError("Unable to initialize backend 'tpu'.\nmore")

    monkeypatch.setattr(jax, "devices", no_devices)
    fails(capsys, "No device can be used: Unable to initialize backend 'tpu'.", "info")
