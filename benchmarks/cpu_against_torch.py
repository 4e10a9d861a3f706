"""Time Stable Diffusion 1.5's UNet on a CPU against PyTorch (diffusers and peft), both in float32.

Two programs are measured, with the same random weights and inputs on both sides:

    forward    one prediction with classifier-free guidance: a batch of two through the UNet, no gradient
    step       one step of LoRA tuning: noise, forward, backward, Adam; every attention projection has an adapter

Our step is `tuning.tune`, the program that `datencoder personalize --method lora` runs, with one sample and the prompt
already encoded; PyTorch's is a diffusers UNet with a peft adapter and `torch.optim.Adam`. The two sides run in turn, so
that a machine that is busy for a while slows both down; still, the ratio is reliable only on an idle machine, and the
table comes with the machine's load. The CPU time in it is that of all threads together, which other programs change
less. Before anything is timed, the predictions of both sides, and then the losses and gradients, have to agree.
"""

import argparse
import functools
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TOLERANCE = 1e-4
"""Largest difference of the two sides, as a share of the largest value."""
GUIDANCE = 7.5
LEARNING_RATE = 1e-3
CONTEXT_LENGTH = 77
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]

STABLE_DIFFUSION = {"cross_attention_dim": 768, "sample_size": 64}
"""What differs from diffusers' defaults in Stable Diffusion 1.5's `unet/config.json`."""
TINY = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "sample_size": 8,
}

EXAMPLE = """\
example:
  python benchmarks/cpu_against_torch.py --repeats 7 --json out/cpu_against_torch.json"""


class Timing(NamedTuple):
    """Seconds of one call: by the clock, and of all threads of this process together."""

    wall: float
    cpu: float


class Measurement(NamedTuple):
    """The timings of one program on both sides.

    Attributes:
        name: "forward" or "step".
        ours, torch: one timing for every repeat.
        difference: how far the two sides' results are apart, as a share of the largest value.
    """

    name: str
    ours: list[Timing]
    torch: list[Timing]
    difference: float

    def medians(self) -> tuple[Timing, Timing]:
        """The median of each kind of seconds, ours and PyTorch's."""
        ours, torch = (Timing(*map(statistics.median, zip(*side, strict=True))) for side in (self.ours, self.torch))
        return ours, torch

    @property
    def ratio(self) -> float:
        """Our median by the clock as a share of PyTorch's."""
        ours, torch = self.medians()
        return ours.wall / torch.wall

    def markdown_row(self) -> str:
        """A row of `MARKDOWN_HEAD`'s table."""
        ours, torch = self.medians()
        return (
            f"| {self.name} | {ours.wall:.3g} s | {torch.wall:.3g} s | {self.ratio:.2f} "
            f"| {ours.cpu:.3g} s | {torch.cpu:.3g} s |"
        )

    def as_json(self) -> dict[str, Any]:
        """All timings and their ratio."""
        sides = {"ours": self.ours, "torch": self.torch}
        timings = {name: [timing._asdict() for timing in side] for name, side in sides.items()}
        return {"name": self.name, "ratio": self.ratio, "difference": self.difference} | timings


MARKDOWN_HEAD = """\
| program | datencoder_jax | PyTorch | ratio | CPU time | CPU time of PyTorch |
|---|---|---|---|---|---|"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each side (default: 5)")
    parser.add_argument("--resolution", type=int, default=256, help="side of the images in pixels (default: 256)")
    parser.add_argument("--rank", type=int, default=4, help="rank of the LoRA (default: 4)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side (default: 2)")
    parser.add_argument(
        "--loop", type=int, default=1, help="passes, and steps, of one measurement, which is divided by it (default: 1)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all seconds and versions to FILE")
    parser.add_argument("--tiny", action="store_true", help="a UNet of a few thousand weights, to try the script")
    options = parser.parse_args(arguments)
    for name in ("repeats", "rank", "threads", "loop"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.resolution < 64 or options.resolution % 64:
        parser.error("--resolution must be a multiple of 64")
    return options


def limit_threads(threads: int) -> None:
    """Sets the threads of both sides; has an effect on XLA only before JAX is first used."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("NPROC", str(threads))
    import torch

    torch.set_num_threads(threads)


def make_torch_unet(options: argparse.Namespace) -> Any:
    """A frozen diffusers UNet with random weights."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(**(TINY if options.tiny else STABLE_DIFFUSION)).eval().requires_grad_(False)


def convert_unet(torch_unet: Any) -> Any:
    """Our model with the weights of a diffusers UNet."""
    import jax.numpy as jnp

    from datencoder_jax.checkpoints.layouts import from_torch_layout
    from datencoder_jax.models.module import Model, abstract_params
    from datencoder_jax.models.unet import UNet2DConditionModel, UNetConfig

    config = UNetConfig.from_dict(dict(torch_unet.config))
    arrays = {name: value.numpy() for name, value in torch_unet.state_dict().items()}
    params = from_torch_layout(arrays, abstract_params(UNet2DConditionModel, config))
    return Model(UNet2DConditionModel, config, {name: jnp.asarray(value) for name, value in params.items()})


def make_base(unet: Any) -> Any:
    """The networks that tuning takes, of which only the UNet has weights: latents and text are already encoded."""
    import jax.numpy as jnp

    from datencoder_jax.base import Base
    from datencoder_jax.diffusion.schedule import ScheduleConfig
    from datencoder_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
    from datencoder_jax.models.module import Model
    from datencoder_jax.models.vae import AutoencoderKL, VAEConfig

    return Base(
        unet=unet,
        vae=Model(AutoencoderKL, VAEConfig(), {}),
        text=Model(CLIPTextModel, CLIPTextConfig(), {}),
        vision=None,
        words=jnp.zeros(0, bool),
        word_norm=jnp.float32(1),
        pixel_mean=jnp.zeros(3),
        pixel_std=jnp.ones(3),
        schedule=ScheduleConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )


def draw_inputs(torch_unet: Any, options: argparse.Namespace) -> tuple[Any, Any]:
    """Random latents `[1, h, w, 4]` and text states of the empty prompt and of a prompt, `[2, 77, d]`."""
    import numpy as np

    rng, side = np.random.default_rng(0), options.resolution // 8
    latents = rng.standard_normal((1, side, side, torch_unet.config.in_channels), dtype=np.float32)
    return latents, rng.standard_normal((2, CONTEXT_LENGTH, torch_unet.config.cross_attention_dim), dtype=np.float32)


def to_nchw(x: Any) -> Any:
    """A torch tensor `[batch, c, h, w]` from an array `[batch, h, w, c]`."""
    import numpy as np
    import torch

    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def relative_difference(actual: Any, expected: Any) -> float:
    """The largest difference of two arrays, as a share of the largest expected value."""
    import numpy as np

    return float(np.abs(np.asarray(actual) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())


def measure_in_turn(functions: list[Callable[[], Any]], repeats: int, passes: int) -> list[list[Timing]]:
    """Times every call of functions that are called one after the other `repeats` times, after a warm-up.

    Args:
        passes: what a call does that many times; its seconds are divided by it.
    """
    timings: list[list[Timing]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, measured in zip(functions, timings, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            if repeat:
                measured.append(Timing((time.perf_counter() - wall) / passes, (time.process_time() - cpu) / passes))
    return timings


def measure_forward(base: Any, torch_unet: Any, options: argparse.Namespace) -> Measurement:
    """Passes with guidance; each takes the prediction of the one before as its latents."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from datencoder_jax.compilation import Program
    from datencoder_jax.diffusion.guidance import guided
    from datencoder_jax.typing import Condition

    latents, context = draw_inputs(torch_unet, options)

    def predict(base, latents, context):
        def predict_once(latents, _):
            halves = base.denoise(jnp.concatenate([latents, latents]), jnp.array([500, 500]), Condition(context))
            return guided(*jnp.split(halves, 2), GUIDANCE), None

        return jax.lax.scan(predict_once, latents, length=options.loop)[0]

    program = Program("guided prediction", predict)
    base, latents, context = jax.device_put((base, latents, context))

    def run_ours():
        return jax.block_until_ready(program(base, latents, context))

    torch_latents, torch_context = to_nchw(latents), torch.from_numpy(np.array(context))

    @torch.no_grad()
    def run_torch():
        x = torch_latents
        for _ in range(options.loop):
            halves = torch_unet(torch.cat([x, x]), torch.tensor([500, 500]), torch_context).sample
            unconditional, conditional = halves.chunk(2)
            x = unconditional + GUIDANCE * (conditional - unconditional)
        return x

    difference = relative_difference(run_ours(), np.moveaxis(run_torch().numpy(), 1, -1))
    check_difference("predictions", difference)
    ours, theirs = measure_in_turn([run_ours, run_torch], options.repeats, options.loop)
    return Measurement("forward", ours, theirs, difference)


def check_difference(what: str, difference: float) -> None:
    """Ends the program where the two sides do not compute the same."""
    if not difference <= TOLERANCE:
        raise SystemExit(f"the {what} of the two sides differ by {difference:.1e} of the largest value")


def measure_step(base: Any, torch_unet: Any, options: argparse.Namespace) -> Measurement:
    """Steps of LoRA tuning with one sample each."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from datencoder_jax import tuning
    from datencoder_jax.methods.lora import zero_offsets
    from datencoder_jax.typing import Condition, LowRank, Variables

    latents, context = draw_inputs(torch_unet, options)
    # Both factors are random, so that both have a gradient from the first step on.
    adapters = {
        path: LowRank(x.down, 0.01 * jax.random.normal(jax.random.fold_in(jax.random.key(1), i), x.up.shape))
        for i, (path, x) in enumerate(zero_offsets(base, options.rank, jax.random.key(0)).items())
    }
    config = tuning.TuningConfig(draws=1, views=1)
    problem = tuning.Problem(
        base=base,
        latents=jnp.asarray(latents),
        soft_ids=jnp.zeros((1, CONTEXT_LENGTH), jnp.int32),
        hard=None,
        blend=jnp.float32(1),
        rates=Variables(jnp.float32(0), jnp.float32(LEARNING_RATE)),
        key=jax.random.key(2),
        soft=Condition(jnp.asarray(context[1:])),
    )
    state = tuning.start(Variables(jnp.zeros((1, context.shape[-1])), adapters))

    def run_ours():
        nonlocal state
        state, losses = jax.block_until_ready(tuning.tune(state, problem, steps=options.loop, config=config))
        return losses

    trainer = TorchTrainer(torch_unet, latents, context[1:], adapters, config.momentum, options.rank)

    def run_torch():
        return [trainer.run_step(*trainer.draw_noisy()) for _ in range(options.loop)]

    # The first step of both sides, with the noise that is ours.
    draw = functools.partial(tuning._draw, count=1, levels=None, focus=None)
    sample = draw(base, problem.latents, jax.random.fold_in(problem.key, 0))
    torch_loss = trainer.run_step(to_nchw(sample.noisy), torch.from_numpy(np.array(sample.t)), to_nchw(sample.target))
    difference = relative_difference(run_ours()[0], torch_loss)
    if options.loop == 1:  # Adam's first moment after one step is the gradient, but for a factor
        moments = state.optimiser.mu.offsets
        gradients = np.concatenate([np.ravel(x) for path in moments for x in moments[path]]) / (1 - config.momentum)
        expected = np.concatenate([np.ravel(x) for path in moments for x in trainer.gradients(path)])
        difference = max(difference, relative_difference(gradients, expected))
    check_difference("losses or gradients", difference)
    ours, theirs = measure_in_turn([run_ours, run_torch], options.repeats, options.loop)
    return Measurement("step", ours, theirs, difference)


class TorchTrainer:
    """LoRA tuning as diffusers and peft do it.

    Args:
        torch_unet: gains the adapter.
        latents, context: clean latents `[1, h, w, c]` and the text states of the prompt `[1, l, d]`.
        adapters: the factors that the adapter starts from, by module path.
        momentum: Adam's first decay.
        rank: of the factors.
    """

    def __init__(self, torch_unet: Any, latents: Any, context: Any, adapters: Any, momentum: float, rank: int):
        import numpy as np
        import torch
        from diffusers import DDPMScheduler
        from peft import LoraConfig

        torch_unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS))
        self.unet, self.modules = torch_unet, dict(torch_unet.named_modules())
        for path, factors in adapters.items():
            for parameter, factor in zip(self.factors(path), factors, strict=True):
                parameter.data = torch.from_numpy(np.array(factor).T.copy())
        tuned = [parameter for parameter in torch_unet.parameters() if parameter.requires_grad]
        if sum(x.numel() for x in tuned) != sum(x.size for pair in adapters.values() for x in pair):
            raise SystemExit("the adapters of the two sides do not have the same number of weights")
        self.optimizer = torch.optim.Adam(tuned, lr=LEARNING_RATE, betas=(momentum, 0.99))
        self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.latents, self.context = to_nchw(latents), torch.from_numpy(context)

    def factors(self, path: str) -> tuple[Any, Any]:
        """The two factors of a projection, `[rank, in]` and `[out, rank]`."""
        module = self.modules[path]
        return module.lora_A["default"].weight, module.lora_B["default"].weight

    def gradients(self, path: str) -> tuple[Any, Any]:
        """The gradients of the two factors, `[in, rank]` and `[rank, out]`."""
        down, up = self.factors(path)
        return down.grad.numpy().T, up.grad.numpy().T

    def draw_noisy(self) -> tuple[Any, Any, Any]:
        """Noisy latents, their timestep and the noise, which is the target."""
        import torch

        noise, t = torch.randn_like(self.latents), torch.randint(0, self.scheduler.config.num_train_timesteps, (1,))
        return self.scheduler.add_noise(self.latents, noise, t), t, noise

    def run_step(self, noisy: Any, t: Any, target: Any) -> float:
        """One step of Adam; returns the loss before it."""
        import torch

        self.optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(self.unet(noisy, t, self.context).sample, target)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def main(arguments: list[str] | None = None) -> list[Measurement]:
    """Measures, prints the table, and returns what was measured."""
    options = parse_arguments(arguments)
    limit_threads(options.threads)
    import diffusers
    import jax
    import peft
    import torch

    load_before = os.getloadavg()[0]
    torch_unet = make_torch_unet(options)
    base = make_base(convert_unet(torch_unet))
    measurements = [measure(base, torch_unet, options) for measure in (measure_forward, measure_step)]
    print(MARKDOWN_HEAD)
    for measurement in measurements:
        print(measurement.markdown_row())
    versions = {module.__name__: module.__version__ for module in (jax, torch, diffusers, peft)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    for measurement in measurements:
        print(f"{measurement.name}: the results of both sides agree to {measurement.difference:.1e}")
    print(f"{options.threads} threads, peak memory {peak / 1e9:.1f} GB, load of the machine before {load_before:.1f}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if options.json is not None:
        report = {
            "options": {name: value for name, value in vars(options).items() if name != "json"},
            "measurements": [measurement.as_json() for measurement in measurements],
            "versions": versions | {"python": platform.python_version()},
            "load_before": load_before,
            "peak_memory_bytes": peak,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return measurements


if __name__ == "__main__":
    main()
