"""Writes docs/performance.md: what the compilers say of Stable Diffusion's programs, on devices that need not be there.

    python benchmarks/performance_page.py work --models 1.5 2.1 XL
    python benchmarks/performance_page.py attention --topologies H100 v5e:1x1
    python benchmarks/performance_page.py programs --models 1.5 --topologies H100 v5e:1x1
    python benchmarks/performance_page.py compiling --models 1.5 XL
    python benchmarks/performance_page.py training --configs configs/sd15_laion.py --topologies 8xH100 v5e:4x4
    python benchmarks/performance_page.py plans
    ACCELERATORS_TABLE=out/compiled.md make test-accelerators
    python benchmarks/performance_page.py compiled --tables out/compiled.md

Each part is measured by itself and kept in docs/performance.json; every call writes the page from all that is there.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from datencoder_jax.plan.environment import prepare_environment

prepare_environment()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402
from performance_text import read_compiled, render_page  # noqa: E402

from datencoder_jax.compilation import Program  # noqa: E402
from datencoder_jax.compile_ahead import without_garbage_collection  # noqa: E402
from datencoder_jax.memory import PRESETS, Memory, for_xl  # noqa: E402
from datencoder_jax.models.dot_product_attention import attend  # noqa: E402
from datencoder_jax.plan import inspection, shapes  # noqa: E402
from datencoder_jax.plan.devices import find_machine  # noqa: E402
from datencoder_jax.plan.dry_run import PlannedProgram, record_programs  # noqa: E402
from datencoder_jax.plan.least_work import least_work  # noqa: E402
from datencoder_jax.plan.measure import measure  # noqa: E402
from datencoder_jax.plan.training import trace_training_step  # noqa: E402
from datencoder_jax.plan.work import trace_work  # noqa: E402
from datencoder_jax.runtime.target import lowering_for  # noqa: E402
from datencoder_jax.training.recipes import load_recipe  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs"
STEPS, SAMPLING_STEPS = 12, 25
PLANS = (
    "--topology H100 --models 1.5 XL",
    "--topology 8xH100 --config configs/sd15_laion.py --set batch_size=64 --programs train",
    "--topology v5e:4x4 --config configs/sd15_laion.py --set batch_size=128 --programs train",
)
ATTENTION = {
    # batch, queries, keys, heads, head dimension
    "1.5, self-attention, 512 px": (8, 4096, 4096, 8, 40),
    "1.5, cross-attention": (8, 4096, 77, 8, 40),
    "XL and 2.1, self-attention": (8, 4096, 4096, 10, 64),
    "1.5, second level": (8, 1024, 1024, 8, 80),
}


def measure_work(version: str) -> list[dict]:
    """Arithmetic of tuning and of drawing beside the least possible, of both paths and of one."""
    rows, machine = [], find_machine("H100")
    resolution = 512 if version == "1.5" else None
    for method, paths in (("datencoder", 2), ("lora", 1)):
        memory = for_xl(Memory()) if version == "XL" else Memory()
        pipeline = shapes.pipeline_of_version(version, method, memory, machine.target)
        unet, side = pipeline.base.unet.config, pipeline.side(resolution)
        least = least_work(unet, side)
        draws, images = memory.draws, memory.batch
        text = 0.0 if method == "lora" else 2 * trace_text(pipeline)
        wanted = {
            "tuning": STEPS * (least.forward(draws, paths=paths) + least.input_gradient(draws, paths=paths) + text),
            "sampling": SAMPLING_STEPS * least.forward(2 * images, paths=paths),
        }
        programs = record_programs(pipeline, machine.devices[0], method=method, steps=STEPS, resolution=resolution)
        for program in programs:
            if program.name not in wanted:
                continue
            work = trace_work(program.traced).total
            if program.name == "tuning" and memory.remat:  # whose forward pass is computed twice, to save memory
                wanted["tuning"] += STEPS * least.forward(draws, paths=paths)
            if program.name == "sampling":  # decoding is as much as the decoder has
                work -= decoding_work(pipeline, side, images)
            row = {"model": version, "method": method, "program": program.name}
            rows.append(row | {"work": work, "least": wanted[program.name], "ratio": work / wanted[program.name]})
            print(rows[-1], flush=True)
    return rows


def trace_text(pipeline) -> float:
    """Operations of reading one prompt."""
    ids = jax.ShapeDtypeStruct((1, 77), jnp.int32)
    base = pipeline.base.only("text", "text_2")
    vectors = jax.ShapeDtypeStruct((1, sum(pipeline.base.widths)), jnp.float32)
    return trace_work(jax.jit(lambda base, *args: base.condition(*args)).trace(base, ids, vectors)).total


def decoding_work(pipeline, side: int, images: int) -> float:
    """Operations of decoding images."""
    from datencoder_jax.sampling import decode

    latents = jax.ShapeDtypeStruct((images, side, side, pipeline.base.unet.config.in_channels), jnp.float32)
    return trace_work(jax.jit(decode).trace(pipeline.base.only("vae"), latents)).total


def measure_attention(topology: str) -> list[dict]:
    """Memory and traffic of forward and gradient by implementation."""
    machine, rows = find_machine(topology), []
    sharding = SingleDeviceSharding(machine.devices[0])
    kernel = "cudnn" if machine.target.platform == "cuda" else "flash"
    for label, (batch, queries, keys, heads, head_dim) in ATTENTION.items():
        q, k = (
            jax.ShapeDtypeStruct((batch, length, heads, head_dim), jnp.bfloat16, sharding=sharding)
            for length in (queries, keys)
        )
        for implementation in ("xla", "blocks", kernel):

            def loss(q, k, v, implementation=implementation):
                return attend(q, k, v, implementation=implementation).astype(jnp.float32).sum()

            with lowering_for(machine.target):
                traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k)
            result = measure(PlannedProgram(implementation, (), traced, 1, 1, 0, {}), machine)
            row = {"device": topology, "attention": label, "implementation": implementation}
            refused = result.refused is not None
            row |= {
                "memory": None if refused else result.room.temporaries,
                "moved": result.costs and result.costs.bytes,
            }
            rows.append(row)
            print(rows[-1], flush=True)
    return rows


def measure_compiling(version: str, topology: str) -> list[dict]:
    """Seconds until all is compiled that a first `personalize` runs, side by side as `compile_ahead` does it."""
    machine, trace, futures = find_machine(topology), Program.trace, []
    memory = for_xl(Memory()) if version == "XL" else Memory()
    pipeline = shapes.pipeline_of_version(version, "datencoder", memory, machine.target)
    threads, started = os.cpu_count() or 1, time.perf_counter()
    executor = ThreadPoolExecutor(threads)

    def trace_and_compile(program, *args, **kwargs):
        traced = trace(program, *args, **kwargs)
        futures.append(executor.submit(traced.lower().compile, machine.compiler_options()))
        return traced

    with mock.patch.object(Program, "trace", trace_and_compile), without_garbage_collection():
        resolution = 512 if version == "1.5" else None
        programs = list(record_programs(pipeline, machine.devices[0], steps=STEPS, resolution=resolution))
        traced_seconds = time.perf_counter() - started
    for future in futures:
        future.result()
    row = {"device": topology, "model": version, "threads": threads, "programs": len(programs)}
    row |= {"traced_seconds": traced_seconds, "seconds": time.perf_counter() - started}
    print(row, flush=True)
    return [row]


def measure_programs(version: str, topology: str, size: int) -> list[dict]:
    """Every program of personalizing with the tuning-encoder and drawing."""
    machine, rows = find_machine(topology), []
    setting = PRESETS[size] if size else (for_xl(Memory()) if version == "XL" else Memory())
    pipeline = shapes.pipeline_of_version(version, "datencoder", setting, machine.target)
    resolution = 512 if version == "1.5" else None
    for program in record_programs(pipeline, machine.devices[0], steps=STEPS, resolution=resolution):
        result = measure(program, machine)
        rows.append({"device": topology, "model": version, "setting": size, **result_to_row(result)})
        print(rows[-1], flush=True)
    return rows


def measure_training(config: str, topology: str) -> list[dict]:
    """The training step at eight images a device."""
    machine = find_machine(topology)
    changes = [f"batch_size={8 * len(machine.devices)}", "accumulate=1"]
    recipe = load_recipe(Path(config), "full", changes)
    base = shapes.stable_diffusion(recipe.architecture, recipe.dtype, machine.target, vision=True)
    result = measure(trace_training_step(recipe, base, machine.devices), machine)
    row = {"device": topology, "recipe": Path(config).stem, **result_to_row(result)}
    row["images_per_second_per_device"] = result.images_per_second and result.images_per_second / len(machine.devices)
    print(row, flush=True)
    return [row]


def make_plan(options: str) -> list[dict]:
    """What `datencoder plan` prints with these options."""
    command = [sys.executable, "-m", "datencoder_jax", "plan", *shlex.split(options)]
    text = subprocess.run(command, cwd=DOCS.parent, stdout=subprocess.PIPE, text=True).stdout
    print(text, flush=True)
    return [{"command": f"datencoder plan {options}", "text": text}]


def result_to_row(result) -> dict:
    """The numbers of a program that compiled, for JSON.

    Raises:
        SystemExit: it did not compile.
    """
    if result.refused is not None:
        raise SystemExit(f"{result.program.name} does not compile: {result.refused}")
    forward, backward = inspection.fused_attention(result.text)
    return {
        "program": result.program.name,
        "memory": result.room.total,
        "arguments": result.room.arguments,
        "temporaries": result.room.temporaries,
        "beside": result.room.beside,
        "fused": [forward, backward],
        "work": result.costs.flops,
        "moved": result.costs.bytes,
        "least_moved": trace_work(result.program.traced).bytes / result.program.devices,
        "sent": result.costs.sent,
        "kernels": result.costs.kernels,
        "least_seconds": result.times.least,
        "limit": result.times.limit,
        "compile_seconds": result.seconds,
        "collectives": {kind: [t.count, t.bytes] for kind, t in result.costs.traffic.items()},
    }


def save_rows(part: str, rows: list[dict], *key: str) -> None:
    """Replaces the rows of `part` that have the same values under `key`, and writes the page."""
    path = DOCS / "performance.json"
    content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    new = {tuple(row[name] for name in key) for row in rows}
    kept = [row for row in content.get(part, []) if tuple(row[name] for name in key) not in new]
    content[part] = kept + rows
    content.setdefault("made", {})[part] = f"jax {jax.__version__}, {time.strftime('%Y-%m-%d')}"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (DOCS / "performance.md").write_text(render_page(content), encoding="utf-8")


def main() -> None:
    """Measures what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("work", "attention", "programs", "compiling", "training", "plans", "compiled"))
    parser.add_argument("--models", nargs="+", default=["1.5"], choices=("1.5", "2.1", "XL"))
    parser.add_argument("--topologies", nargs="+", default=["H100"], metavar="NAME")
    parser.add_argument("--configs", nargs="+", default=["configs/sd15_laion.py"], metavar="RECIPE")
    parser.add_argument("--memory", nargs="+", type=int, default=[0], choices=(0, 8, 16, 24))
    parser.add_argument("--plan", nargs="+", default=PLANS, metavar="OPTIONS", help="options of datencoder plan")
    parser.add_argument("--tables", nargs="+", type=Path, default=[], metavar="FILE", help="of make test-accelerators")
    args = parser.parse_args()
    if args.part != "compiling":
        jax.config.update("jax_optimization_level", "O0")  # as plans do
    if args.part == "work":
        for version in args.models:
            save_rows("work", measure_work(version), "model")
    if args.part == "plans":
        for options in args.plan:
            save_rows("plans", make_plan(options), "command")
    if args.part == "compiled":
        save_rows("compiled", read_compiled(args.tables), "device", "program")
    for topology in args.topologies if args.part not in ("work", "plans", "compiled") else ():
        if args.part == "attention":
            save_rows("attention", measure_attention(topology), "device")
        if args.part == "programs":
            for version in args.models:
                for size in args.memory:
                    save_rows("programs", measure_programs(version, topology, size), "device", "model", "setting")
        if args.part == "compiling":
            for version in args.models:
                save_rows("compiling", measure_compiling(version, topology), "device", "model")
        if args.part == "training":
            for config in args.configs:
                save_rows("training", measure_training(config, topology), "device", "recipe")


if __name__ == "__main__":
    main()
