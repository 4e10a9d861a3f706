"""Plans: what they read of compiled programs, against numbers worked out by hand, and what does not fit."""

import contextlib
import io
import json
import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import write_tiny_base

from datencoder_jax import cli
from datencoder_jax.commands import plan as command
from datencoder_jax.errors import UserError
from datencoder_jax.models.dot_product_attention import attend
from datencoder_jax.plan import advice, costs, devices, hlo, measure, shapes
from datencoder_jax.plan.dry_run import PlannedProgram
from datencoder_jax.plan.environment import prepare_environment
from datencoder_jax.plan.work import count_attention, count_work
from datencoder_jax.runtime.hardware import CHIPS, GPUS, describe_gpu, find_chip
from datencoder_jax.runtime.target import Target, lowering_for
from datencoder_jax.training import mesh as on_mesh
from datencoder_jax.training.recipes import load_recipe

ROWS, WIDTH, LAYERS = 64, 32, 5
BATCH = 2**23
P = PartitionSpec


@pytest.fixture(scope="module")
def mesh():
    return on_mesh.make_mesh({"data": 2, "fsdp": 4})


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def shaped(mesh, shape, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


# --- work


def test_a_product_is_counted_on_each_chip(mesh):
    x, w = shaped(mesh, (ROWS, WIDTH), ("data", "fsdp")), shaped(mesh, (WIDTH, WIDTH))
    program = compiled(lambda x, w: x @ w, x, w)
    found = costs.costs(program, 8)
    assert found.flops == program.cost_analysis()["flops"] == 2 * ROWS * WIDTH * WIDTH / 8
    assert not found.traffic and found.known


def test_the_body_of_a_loop_counts_as_often_as_it_runs(mesh):
    x, w = shaped(mesh, (ROWS, WIDTH), ("data", "fsdp")), shaped(mesh, (LAYERS, WIDTH, WIDTH))
    program = compiled(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], x, w)
    product = 2 * ROWS * WIDTH * WIDTH / 8
    assert program.cost_analysis()["flops"] < 1.1 * product  # XLA counts it once
    found = costs.costs(program, 8)
    assert LAYERS * product <= found.flops < 1.1 * LAYERS * product and found.known
    # Every turn reads and writes x and reads one w; the loop copies them at most once more.
    turn = 4 * (2 * ROWS * WIDTH / 8 + WIDTH * WIDTH)
    assert LAYERS * turn <= found.bytes < 3 * LAYERS * turn


def test_a_loop_of_unknown_length_is_marked():
    def halve(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1.0, lambda x: x @ x, x)

    assert not costs.costs(compiled(halve, jax.ShapeDtypeStruct((8, 8), jnp.float32)), 1).known


def test_work_is_counted_before_any_compiler():
    def loss(x, w):
        def body(x, _):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(jax.checkpoint(body), x, length=LAYERS)[0].sum()

    x, w = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32), jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    product = 2 * ROWS * WIDTH * WIDTH
    # Forward, again in the backward pass, and the gradients of both factors; of x alone, one less.
    assert count_work(jax.jit(jax.grad(loss, (0, 1))).trace(x, w).jaxpr).products == 4 * LAYERS * product
    assert count_work(jax.jit(jax.grad(loss)).trace(x, w).jaxpr).products == 3 * LAYERS * product


@pytest.mark.parametrize("remat, forward", [(False, 1), (True, 2)])
def test_flash_attention_and_its_gradient(remat, forward):
    batch, length, heads, head_dim = 1, 1024, 2, 128

    def loss(x):
        return attend(x, x, x).astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct((batch, length, heads, head_dim), jnp.bfloat16)
    with lowering_for(Target("tpu")):
        traced = jax.jit(jax.grad(jax.checkpoint(loss) if remat else loss)).trace(x)
    assert count_attention(traced.jaxpr) == (forward, 1)
    product = 2 * batch * heads * length**2 * head_dim
    assert count_work(traced.jaxpr).attention == (2 * forward + 4 + 3) * product


def test_the_least_traffic_is_operands_and_results_of_products():
    def layers(x, w):  # whose activation is fused into the product before it
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=LAYERS)[0]

    x, w = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16), jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16)
    work = count_work(jax.jit(layers).trace(x, w).jaxpr)
    assert work.bytes == LAYERS * 2 * (2 * ROWS * WIDTH + WIDTH * WIDTH)


def test_work_of_branches_loops_and_devices(mesh):
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    branches = jax.jit(lambda p, x: jax.lax.cond(p, lambda x: x @ x, lambda x: x @ (x @ x), x))
    assert count_work(branches.trace(True, x).jaxpr).total == 2 * 2 * 8**3
    unknown = count_work(
        jax.jit(lambda x: jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ x, x)).trace(x).jaxpr
    )
    assert not unknown.known and unknown.total == 2 * 8**3
    rows = shaped(mesh, (ROWS, WIDTH), ("data", "fsdp"))
    local = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P(("data", "fsdp")))
    assert count_work(jax.jit(local).trace(rows).jaxpr).total == 8 * 2 * (ROWS // 8) ** 2 * WIDTH


@pytest.mark.parametrize("stride, padding, dilation", [(1, "SAME", 1), (2, "SAME", 1), (1, "VALID", 2)])
def test_convolutions_and_their_gradients(stride, padding, dilation):
    def convolve(x, w):
        labels = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (stride,) * 2, padding, (1, 1), (dilation,) * 2, labels)

    x, w = jax.ShapeDtypeStruct((2, 9, 9, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 4), jnp.float32)
    program = compiled(jax.grad(lambda *xw: jnp.square(convolve(*xw)).sum(), (0, 1)), x, w)
    steps = list(hlo.executed(program.as_text()))
    ours = sum(costs.operations(step.instruction, step.computation) for step in steps)
    rest = program.cost_analysis()["flops"] - ours  # of squares, sums and factors: a few per number
    assert sum(step.instruction.opcode == "convolution" for step in steps) == 3
    traced = jax.jit(jax.grad(lambda *xw: jnp.square(convolve(*xw)).sum(), (0, 1))).trace(x, w)
    assert count_work(traced.jaxpr).convolutions == ours
    assert 0 <= rest < 10 * 2 * 9 * 9 * 4


# --- traffic


def test_collectives_by_kind_count_and_bytes(mesh):
    ring = [(i, (i + 1) % 8) for i in range(8)]
    everyone = ("data", "fsdp")

    def local(x):
        def hop(x, _):
            return jax.lax.ppermute(x, everyone, ring), None

        moved, _ = jax.lax.scan(hop, x, length=7)
        gathered = jax.lax.all_gather(x, "fsdp", tiled=True)
        scattered = jax.lax.psum_scatter(x, "fsdp", tiled=True)
        traded = jax.lax.all_to_all(x.reshape(4, -1), "fsdp", 0, 0, tiled=True)
        return moved, gathered, scattered, traded, jax.lax.psum(x, "data")

    function = jax.shard_map(local, mesh=mesh, in_specs=P(everyone), out_specs=P(everyone), check_vma=False)
    found = costs.costs(compiled(function, shaped(mesh, (ROWS, WIDTH), everyone)), 8)
    block = 4 * ROWS * WIDTH / 8  # bytes on each chip
    assert {kind: (traffic.count, traffic.bytes) for kind, traffic in found.traffic.items()} == {
        "collective-permute": (7, 7 * block),
        "all-gather": (1, 3 * block),
        "reduce-scatter": (1, 3 / 4 * block),
        "all-to-all": (1, 3 / 4 * block),
        "all-reduce": (1, 2 * 1 / 2 * block),
    }
    assert found.sent == sum(traffic.bytes for traffic in found.traffic.values()) and found.known


@pytest.mark.parametrize(
    "groups, size",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=4], device_ids=([4,4]T(1,0)) {'a'}", 4),
        ("replica_groups=mesh['a'=16,'b'=1] {'a','b'}", 16),
        ("replica_groups=mesh['a'=16] {'a':(4)2}", 2),
        ("replica_groups={}", 8),
    ],
)
def test_groups_as_they_are_written(groups, size):
    assert costs.group_size(f", channel_id=1, {groups}, use_global_device_ids=true", 8) == size


TPU = (Path(__file__).parent / "data" / "plan" / "v5e_4x4.hlo").read_text(encoding="utf-8")
"""Of `value_and_grad` of a scan over six `tanh(x @ w)`, recomputed, and a ring of permutes beside an all-gather."""


def test_the_text_of_a_program_for_tpus():
    found = costs.count(TPU, 16, 1.0, 1.0)
    assert found.known and found.flops == 6
    kinds = {kind: (traffic.count, traffic.bytes) for kind, traffic in found.traffic.items()}
    part, whole = 2 * 256 * 1024, 2 * 1024 * 1024  # bytes of bfloat16: a chip's share of a layer, and all of it
    assert kinds == {
        "all-gather": (12, 12 * 3 * part),
        "reduce-scatter": (6, 6 * 3 / 4 * whole),
        "all-reduce": (7, 6 * 2 * 3 / 4 * part + 2 * 15 / 16 * 4),
    }


def test_a_collective_that_a_tpu_spreads_over_fusions_is_one():
    line = (
        "%g.{0} = f32[256,128]{{1,0}} all-gather(%p.{0}), channel_id=2, replica_groups={{{{0,1,2,3}}}}, "
        'frontend_attributes={{chain_id="0"}}'
    )
    parts = "\n".join(
        f"%c.{i} (p: f32[64,128]) -> f32[256,128] {{\n  %p.{i} = f32[64,128]{{1,0}} parameter(0)\n  ROOT "
        + line.format(i)
        + "\n}\n"
        for i in range(3)
    )
    calls = "\n".join(f"  %f.{i} = f32[256,128]{{1,0}} fusion(%x), kind=kCustom, calls=%c.{i}" for i in range(3))
    entry = "ENTRY %main (x: f32[64,128]) -> f32[256,128] {\n  %x = f32[64,128]{1,0} parameter(0)"
    text = f"{parts}\n{entry}\n{calls}\n}}\n"
    assert costs.count(text, 4, 0.0, 0.0).traffic == {"all-gather": costs.Traffic(1, 3 * 4 * 64 * 128)}


# --- memory


@pytest.mark.parametrize(
    "message, needed",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (36.00G) "
            "exceeds available HBM (15.75G).",
            (36 * 2**30, int(15.75 * 2**30)),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 512.5M "
            "of 256.0M hbm. Exceeded hbm capacity by 256.5M.",
            (int(512.5 * 2**20), 256 * 2**20),
        ),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1073741824 bytes.", (2**30, None)),
        ("RESOURCE_EXHAUSTED: too many of something", (0, None)),
        ("INTERNAL: something else", None),
    ],
)
def test_what_a_refusal_says(message, needed):
    assert measure.refused_for_memory(message) == needed


def test_a_refused_program_is_a_result(mesh):
    class Refusing:
        def lower(self, *_):
            return self

        def compile(self, _):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out, required for HLO temporaries (20G) exceeds available HBM (16G)."
            )

    program = PlannedProgram("train", (), Refusing(), 8, 1, 2**30, {})
    result = measure.measure(program, devices.Machine("x", jax.devices(), CHIPS["v5e"], 16 * 2**30))
    assert not result.fits and result.room.arguments == 2**30
    assert result.room.total == 20 * 2**30 and result.room.available == 16 * 2**30
    assert not result.to_dict()["fits"]


def test_the_roofline_is_the_slowest_of_three():
    chip = CHIPS["v5e"]
    found = costs.Costs(197e12, 2 * 819e9, {"all-reduce": costs.Traffic(1, 100e9)})
    times = measure.estimate(found, chip)
    assert (times.compute, times.memory, times.links) == (1.0, 2.0, 0.5)
    assert (times.least, times.limit) == (2.0, "memory")


RECIPE = """
from ml_collections import ConfigDict

def get_config(variant="full"):
    return ConfigDict({
        "stage": "encoder", "architecture": "1.5", "model": MODEL, "vision": "", "dtype": "float32",
        "resolution": 16, "output": "", "initial": "", "data": ({"kind": "world", "weight": 1.0},), "augment": {},
        "encoder": {"rank": 2, "width": 8, "depth": 1, "heads": 2, "blend": 0.5},
        "weights": {"contrastive": 0.01, "norm": 1e-3, "temperature": 0.1, "neighbours": 2, "gamma": 5.0,
                    "contrastive_warmup": 0},
        "batch_size": 32, "accumulate": 1, "remat": False, "mesh": {"data": -1, "fsdp": 2}, "steps": 10, "seed": 0,
        "ema": 0.9, "optim": {"schedule": "constant", "lr": 1e-4, "warmup": 1, "decay": 0.1, "weight_decay": 0.01,
                              "clip": 1.0, "b1": 0.9, "b2": 0.99, "no_decay": ""},
    })
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    path = folder / "recipe.py"
    path.write_text(RECIPE.replace("MODEL", repr(str(write_tiny_base(folder)))), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def planned(recipe):
    """Exit status and output of a plan for far too large a batch, as a table and as JSON, and what was compiled for it.

    It is compiled once, for four devices of data and two of fsdp.
    """
    results, said = [], []

    def once(program, machine):
        if not results:
            results.append(measure.measure(program, machine))
        return results[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_measure", once)
        for rest in ([], ["--json"]):
            with contextlib.redirect_stdout(io.StringIO()) as output:
                status = cli.main(
                    ["plan", "--config", str(recipe), "--set", f"batch_size={BATCH}", "--programs", "train", *rest]
                )
            said.append((status, output.getvalue()))
    return results[0], said


def split(name, shape, spared=("bias", "norm", "class_embedding")):
    """Bytes of a float32 parameter on one of two devices of fsdp, worked out apart from `training.mesh`."""
    whole = len(shape) < 2 or any(word in name.rpartition(".weight")[0] + name[-5:] for word in spared) or shape[-1] % 2
    return 4 * math.prod(shape) // (1 if whole else 2)


def test_the_arguments_of_a_training_step_by_hand(recipe, planned):
    result, _ = planned
    base, program = shapes.base_of_folder(Path(load_recipe(recipe).model), "float32"), result.program
    models = (base.unet, base.vae, base.text, base.vision)
    frozen = sum(split(name, x.shape) for model in models for name, x in model.params.items())
    frozen += base.words.size + 4 + 2 * 3 * 4  # words, their norm, mean and deviation of pixels
    tokens = base.text.config.max_position_embeddings
    frozen += 4 * tokens * (1 + 27)  # the empty prompt and the templates
    params = sum(split(name, x.shape, ("bias", "norm")) for name, x in program.arguments[0].params.items())
    assert program.parts["frozen"] == frozen
    # Parameters, their average and two moments; five counters: of steps, skipped ones, those in a row, and optax's two.
    assert program.parts["state"] == 4 * params + 5 * 4
    assert program.parts["batch"] == BATCH // 8 * (16 * 16 * 3 + 16 * 16 * 3 + 4 + 4)
    assert result.room.arguments == sum(program.parts.values())
    # The state takes the place of the one before; metrics are left, and eight bytes for the address of each array.
    assert result.room.results < 8 * (len(jax.tree.leaves(program.arguments[0])) + 50)
    assert result.times is None  # the peaks of this machine are not known


def test_the_traffic_of_a_training_step(planned):
    result, _ = planned
    assert result.program.devices == 8 and result.costs.known
    params = result.program.arguments[0].params.values()
    whole = sum(4 * x.size for x in params if x.sharding.is_fully_replicated)
    assert result.costs.traffic["all-reduce"].bytes > 2 * 7 / 8 * whole  # their gradients
    # The ring of the contrastive loss: seven hops forward, and as many of the gradient.
    assert result.costs.traffic["collective-permute"].count >= 14


def test_too_large_a_recipe_is_refused_with_two_ways_out(planned):
    _, ((status, said), _) = planned
    assert status == 1
    assert "mesh data 4, fsdp 2" in said and "train does not fit: it needs" in said
    assert [line.split("=")[0] for line in said.splitlines()[-2:]] == ["1. --set accumulate", "2. --set remat"]


def test_json_has_what_the_table_has(planned):
    result, (_, (status, said)) = planned
    found = json.loads(said)
    assert status == 1 and not found["fits"] and found["effort"] == "O0"
    assert [knob["setting"].split("=")[0] for knob in found["advice"]] == ["accumulate", "remat"]
    (train,) = found["programs"]
    assert train["chips"] == 8 and train["flops"] == result.costs.flops > 0
    assert train["memory_bytes"]["arguments"] == sum(train["memory_bytes"]["parts"].values())
    assert train["collectives"]["all-reduce"]["bytes"] == result.costs.traffic["all-reduce"].bytes


def test_what_fits_is_no_failure(recipe, planned, monkeypatch, capsys):
    result, _ = planned
    roomy = replace(result, room=replace(result.room, available=2**60))
    monkeypatch.setattr(command, "_measure", lambda *_: roomy)
    assert cli.main(["plan", "--config", str(recipe), "--programs", "train"]) == 0
    assert "does not fit" not in capsys.readouterr().out


def test_previews_are_planned_on_the_mesh(recipe, monkeypatch, capsys):
    """With the training state beside them, of which they read the average alone; filled up for eight devices."""
    arguments = ["plan", "--config", str(recipe), "--programs", "previews", "--json"]
    arguments += ["--set", "batch_size=32", "--set", "accumulate=1"]
    assert cli.main(arguments) == 0
    (previews,) = json.loads(capsys.readouterr().out)["programs"]
    assert previews["program"] == "previews" and previews["chips"] == 8 and previews["images"] % 8 == 0
    memory = previews["memory_bytes"]
    parts, shown = memory["parts"], memory["arguments"] - memory["parts"]["frozen"] - memory["parts"]["batch"]
    assert 0 < shown < parts["state"] / 3 and memory["beside"] == parts["state"] - shown


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "nothing to plan"),
        (["--config", "RECIPE", "--models", "1.5"], "leave --models out"),
        (["--config", "RECIPE", "--set", "batch_size=12"], "a batch of 12 cannot be shared by 8 devices"),
        (["--config", "RECIPE", "--set", "accumulate=3"], "a batch of 32 cannot be taken in 3 parts by 8 devices"),
        (["--config", "RECIPE", "--memory", "8", "16"], "there is one method and one setting of --memory"),
        (["--config", "RECIPE", "--methods", "lora", "datencoder"], "there is one method and one setting of --memory"),
        (["--config", "RECIPE", "--methods", "e4t"], "e4t does not start from the encoder that"),
        (["--config", "RECIPE", "--resolution", "64"], "change it with --set resolution=PIXELS"),
        (["--models", "1.5", "--programs", "train"], "the program train is of a recipe"),
        (["--models", "1.5", "--programs", "previews"], "the program previews is of a recipe"),
        (["--models", "1.5", "--set", "seed=1"], "--set and --variant are of a recipe"),
        (["--config", "RECIPE", "--set", "stage=unet"], "is no recipe of an encoder"),
        (["--config", "RECIPE", "--set", "model=nobody/nothing", "architecture=9"], "architecture is '9'"),
    ],
)
def test_mistakes_are_sentences(recipe, arguments, words, capsys):
    assert cli.main(["plan", *(str(recipe) if word == "RECIPE" else word for word in arguments)]) == 2
    assert words in capsys.readouterr().err


# --- slices of TPUs


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match=r"datencoder_jax\[plan\]"):
        devices.find_machine("v5e:4x4")


@pytest.mark.parametrize("topology", ["H999", "9xH100", "0xH100", "x8H100", "", "8x"])
def test_an_unknown_topology_is_a_sentence(topology):
    message = r"there is no topology .*; name a GPU \(H100, H200, A100, L4, RTX4090, T4\), up to"
    with pytest.raises(UserError, match=message):
        devices.find_machine(topology)


def test_a_missing_compiler_for_gpus_is_named(monkeypatch):
    monkeypatch.setattr(devices, "has_module", lambda name: name != "nvidia.cudnn")
    with pytest.raises(UserError, match=r"not installed .nvidia-cudnn-cu12.: pip install .datencoder_jax\[plan-gpu\]"):
        devices.find_machine("H100")


def test_a_module_below_a_missing_package_is_missing():
    assert not devices.has_module("no_such_package.module") and devices.has_module("json.decoder")


def test_a_compiler_of_another_release_is_named(monkeypatch):
    monkeypatch.setattr(devices, "has_module", lambda name: True)
    monkeypatch.setattr(devices.metadata, "version", lambda name: "0.9.1" if "plugin" in name else "0.10.2")
    with pytest.raises(UserError, match=r"jax-cuda12-plugin 0.9.1 does not belong to jaxlib 0.10.2: pip install"):
        devices.find_machine("8xh100")


@pytest.mark.parametrize("name", GPUS)
def test_gpus_are_described_in_xla_s_text_form(name):
    text, gpu = describe_gpu(name), GPUS[name]
    assert text.count("{") == text.count("}") and f'device_description_str: "{gpu.kind}"' in text
    assert f"core_count: {gpu.cores}\n" in text and "device_memory_size: " in text
    assert f"major: {gpu.compute_capability[0]} minor: {gpu.compute_capability[1]}" in text
    assert find_chip(Namespace(device_kind=gpu.kind)) == CHIPS[name]
    assert find_chip(Namespace(device_kind="NVIDIA L40S")) is None


def test_a_slice_without_any_tpu(monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    prepare_environment()
    assert len(devices.find_machine("v5e:1x1").devices) == 1 and len(devices.find_machine("v4:2x2x1").devices) == 4
    with pytest.raises(UserError, match="no TPU slice v5e:3x7"):
        devices.find_machine("v5e:3x7")
    machine = devices.find_machine("v5e:4x4")
    assert len(machine.devices) == 16 and machine.chip == CHIPS["v5e"]
    mesh = on_mesh.make_mesh({"data": -1, "fsdp": 4}, machine.devices)
    x = shaped(mesh, (16 * ROWS, WIDTH), ("data", "fsdp"), dtype=jnp.bfloat16)
    w = shaped(mesh, (LAYERS, WIDTH, WIDTH), None, "fsdp", dtype=jnp.bfloat16)
    layers = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0])
    result = measure.measure(PlannedProgram("layers", (x, w), layers.trace(x, w), 16, 16 * ROWS, 0, {}), machine)
    product = LAYERS * 2 * ROWS * WIDTH * WIDTH
    assert result.fits and result.costs.flops == product
    gathered = result.costs.traffic["all-gather"].bytes
    assert gathered == 3 / 4 * 2 * LAYERS * WIDTH * WIDTH
    assert result.times.least == max(result.costs.flops / 197e12, result.costs.bytes / 819e9, gathered / 200e9)


# --- advice


class Found:
    """A result that lacks 8 GB, of a recipe on sixteen chips."""

    program = Namespace(devices=16, parts={"state": 4 * 10**9, "frozen": 4 * 10**9})
    room = measure.Room(8 * 10**9, 0, 16 * 10**9, 0, 0, 16 * 10**9)


def recipe_of(**changes):
    from ml_collections import ConfigDict

    plain = {"batch_size": 256, "accumulate": 1, "remat": True, "dtype": "bfloat16", "resolution": 512}
    return ConfigDict(plain | {"mesh": {"data": -1, "fsdp": 1}} | changes)


@pytest.mark.parametrize(
    "changes, settings",
    [
        ({}, ["accumulate=2", "mesh.fsdp=16"]),
        ({"remat": False}, ["remat=true", "accumulate=2"]),
        ({"dtype": "float32", "accumulate": 16}, ["dtype=bfloat16", "mesh.fsdp=16"]),
        ({"accumulate": 16, "mesh": {"data": 1, "fsdp": 16}}, ["resolution=256"]),
    ],
)
def test_the_settings_that_save_most_come_first(changes, settings):
    found = advice.knobs(recipe_of(**changes), Found)
    assert [knob.setting for knob in found] == settings
    assert [knob.saves for knob in found] == sorted((knob.saves for knob in found), reverse=True)
