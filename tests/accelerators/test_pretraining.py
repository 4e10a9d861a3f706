"""The training step of every recipe, compiled for several GPUs and TPUs, and its collectives."""

from pathlib import Path

import jax
import pytest
from test_personalize import FLOAT32_PLACES, check_fused_attention
from tiny import in_half_precision

from datencoder_jax.plan import inspection, shapes
from datencoder_jax.plan.devices import find_machine
from datencoder_jax.plan.training import trace_preview_drawing, trace_task_step, trace_training_step
from datencoder_jax.training import mesh as on_mesh
from datencoder_jax.training.recipes import load_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
TOPOLOGIES = ("8xH100", "v5e:4x4")
BUDGETS = {("1.5", "8xH100"): 10.0, ("1.5", "v5e:4x4"): 10.7}
"""GB of a device at 8 images, by model and devices."""

PREVIEW_BUDGETS = {("1.5", "8xH100"): 6.8, ("1.5", "v5e:4x4"): 6.6}
"""Likewise for drawing previews, the training state beside it."""

SLOW = ("sd15_paper", "sd21_laion", "sdxl_laion")
"""Recipes that are compiled at night; sd15_paper differs from sd15_laion in its data and batches alone."""
PHOTOGRAPHS = [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in ("sd15_laion", "e4t_faces", *SLOW)
]
FLOAT32_TRAINING = (*FLOAT32_PLACES, "training/tuning_encoder.py:offset_norm", "training/optim.py")


@pytest.mark.parametrize("recipe", PHOTOGRAPHS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_recipes_on_photographs(topology, recipe, compiled):
    machine = find_machine(topology)
    # Eight images on each device at a time, whatever the recipe has on more devices.
    changes = [f"batch_size={8 * len(machine.devices)}", "accumulate=1"]
    config = load_recipe(CONFIGS / f"{recipe}.py", "full", changes)
    base = shapes.stable_diffusion(config.architecture, config.dtype, machine.target, vision=True)
    program = trace_training_step(config, base, machine.devices)
    result = compiled(program, machine, recipe)
    check_training_step(result, program)
    assert result.room.total <= 1e9 * BUDGETS.get((config.architecture, topology), float("inf"))
    check_collectives(result, program, is_contrastive=config.stage == "encoder")


@pytest.mark.parametrize("recipe", PHOTOGRAPHS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_previews_of_recipes_on_photographs(topology, recipe, compiled):
    """Drawn by all devices, each its rows, with weights that a part of the devices shares."""
    machine = find_machine(topology)
    config = load_recipe(CONFIGS / f"{recipe}.py", "full", [f"batch_size={8 * len(machine.devices)}", "accumulate=1"])
    base = shapes.stable_diffusion(config.architecture, config.dtype, machine.target, vision=True)
    result = compiled(trace_preview_drawing(config, base, machine.devices), machine, recipe)
    assert not inspection.host_callbacks(result.text)
    check_fused_attention(result)
    assert result.room.total <= 1e9 * PREVIEW_BUDGETS.get((config.architecture, topology), float("inf"))


def check_training_step(result, program):
    assert not inspection.host_callbacks(result.text)
    check_fused_attention(result)
    assert not inspection.float32_products(result.text, FLOAT32_TRAINING)
    assert inspection.aliased_outputs(result.text) == len(jax.tree.leaves(program.arguments[0]))


def check_collectives(result, program, *, is_contrastive):
    """Gradients are added up and vectors go round the ring; no batch and no attention is gathered."""
    traffic, devices = result.costs.traffic, program.devices
    assert set(traffic) <= {"all-reduce", "collective-permute", "all-gather"}
    gradients = sum(4 * x.size for x in program.arguments[0].params.values())
    once = 2 * (devices - 1) / devices * gradients
    assert traffic["all-reduce"].bytes < 1.05 * once + 1e6
    if is_contrastive:
        assert traffic["collective-permute"].count >= devices - 1
    gathered = traffic["all-gather"].bytes if "all-gather" in traffic else 0.0
    assert gathered < 8e6  # predicted vectors of the batch, and no picture or latent of it


TOYWORLD = ("toyworld_vae", "toyworld_clip", "toyworld_unet", "toyworld_judge", "toyworld_encoder", "toyworld_e4t")


@pytest.mark.parametrize("recipe", TOYWORLD)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_recipes_of_the_embedded_world(topology, recipe, compiled, monkeypatch, tmp_path):
    """The tasks that the recipes make, caught before they train."""
    task, config = catch_task(recipe, monkeypatch, tmp_path)
    machine = find_machine(topology)
    result = compiled(trace_caught_task(task, config, {"data": -1}, machine), machine, recipe)
    assert not inspection.host_callbacks(result.text)


@pytest.mark.parametrize("recipe", ["toyworld_encoder", "toyworld_e4t"])
@pytest.mark.parametrize("topology", ["8xH100"])
def test_weights_shared_over_gpus(topology, recipe, compiled, monkeypatch, tmp_path):
    """In bfloat16, whose attention is cuDNN's: XLA cannot partition it, and keys come split over heads."""
    task, config = catch_task(recipe, monkeypatch, tmp_path)
    task.frozen = task.frozen._replace(base=in_half_precision(task.frozen.base))
    machine = find_machine(topology)
    result = compiled(trace_caught_task(task, config, {"data": -1, "fsdp": 2}, machine), machine, f"{recipe} fsdp=2")
    check_training_step(result, result.program)


def trace_caught_task(task, config, sizes, machine):
    mesh = on_mesh.make_mesh(sizes, machine.devices)
    batch = {
        name: jax.ShapeDtypeStruct((8 * len(machine.devices), *x.shape[1:]), x.dtype)
        for name, x in task.batch(0, slice(0, len(machine.devices))).items()
    }
    if getattr(task, "mesh", None) is not None:  # of the devices that are here
        task.mesh = mesh
    return trace_task_step(task, config, jax.eval_shape(task.init, jax.random.key(0)), batch, mesh)


class Caught(Exception):
    """Carries a task out of a stage that was about to train it."""


def catch_task(recipe, monkeypatch, tmp_path):
    from datencoder_jax.training import encoder_stage, stages

    def stop(task, config, *args, **options):
        raise Caught(task, config)

    monkeypatch.setattr(stages, "fit", stop)
    monkeypatch.setattr(encoder_stage, "fit", stop)
    monkeypatch.chdir(tmp_path)
    config = load_recipe(CONFIGS / f"{recipe}.py", "smoke", [])
    if recipe == "toyworld_clip":
        (Path(config.base)).mkdir(parents=True)
    if recipe == "toyworld_unet":  # which reads the parts that were trained before it
        from datencoder_jax.checkpoints.hub import ASSETS
        from datencoder_jax.checkpoints.hub import TOYWORLD as name

        Path(config.base).parent.mkdir(parents=True, exist_ok=True)
        Path(config.base).symlink_to(ASSETS / name)
    with pytest.raises(Caught) as caught:
        stages.run_stage(config, tmp_path)
    return caught.value.args
