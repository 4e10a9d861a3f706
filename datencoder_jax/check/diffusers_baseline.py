"""The same tuning and drawing by diffusers and PEFT on torch, on the same device and in the same run, as a ratio.

Both sides have models of the same sizes with random weights in the same type, encode 16 views and a prompt, make the
same number of LoRA steps of rank 4 on all attention projections with a batch of the same size, and draw the same number
of pictures with 25 DDIM steps and guidance. Theirs is run as its documentation has it, without `torch.compile`.

    ratio = their warm seconds / our warm seconds                                                   (1)
"""

import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from datencoder_jax import api
from datencoder_jax.check.part import LeftOut, Outcome, print_progress
from datencoder_jax.check.speed import PICTURES, STEPS
from datencoder_jax.check.workload import Workload
from datencoder_jax.pipeline import Pipeline

_RANK = 4
_SAMPLING_STEPS = 25
_VIEWS = 16
_LEARNING_RATE = 1e-3
_PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
_PROMPT = "a photo of a robot"
_WORD = "robot"


def check_diffusers(workload: Workload) -> Outcome:
    """Measures both sides.

    Raises:
        LeftOut: a package is missing, or torch does not use this device.
    """
    missing = [name for name in ("torch", "diffusers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise LeftOut(f"not installed: {', '.join(missing)}")
    torch = _import_module("torch")

    if not torch.cuda.is_available():
        raise LeftOut("torch has no CUDA device")
    try:
        return compare_with_diffusers(workload.pipeline, workload.image, "cuda")
    except torch.cuda.OutOfMemoryError as error:
        raise LeftOut("JAX leaves torch too little memory; set XLA_CLIENT_MEM_FRACTION=0.4") from error


def compare_with_diffusers(
    pipeline: Pipeline, image: np.ndarray, device: str, *, steps: int = STEPS, pictures: int = PICTURES
) -> Outcome:
    """Seconds of both sides and their ratios (1).

    Args:
        pipeline: the model, whose sizes the other side has too.
        image: uint8 of the model's resolution.
        device: torch's name of the device that JAX uses.
        steps: of tuning.
        pictures: that are drawn.
    """
    torch = _import_module("torch")

    print_progress("LoRA steps and drawing, ours")
    ours = _measure_ours(pipeline, image, steps, pictures)
    print_progress("LoRA steps and drawing, by diffusers")
    theirs = _measure_theirs(pipeline, image, device, steps, pictures)
    values: dict[str, Any] = {"torch": torch.__version__, "steps": steps, "pictures": pictures}
    values |= {"batch": pipeline.memory.draws, "seconds": ours, "diffusers_seconds": theirs}
    return Outcome(values | {"ratio": {name: theirs[name] / ours[name] for name in ours}})


def _measure_ours(pipeline: Pipeline, image: np.ndarray, steps: int, pictures: int) -> dict[str, float]:
    def tune() -> None:
        options: dict[str, Any] = {"method": "lora", "word": _WORD, "rank": _RANK, "steps": steps}
        jax.block_until_ready(api.personalize(pipeline, [image], **options, quiet=True).concept.offsets)

    def draw() -> None:
        api.generate(pipeline, [_PROMPT], num=pictures, sampling_steps=_SAMPLING_STEPS, quiet=True)

    return {"tuning": _time_second_run(tune), "drawing": _time_second_run(draw)}


def _measure_theirs(pipeline: Pipeline, image: np.ndarray, device: str, steps: int, pictures: int) -> dict[str, float]:
    """Seconds of the other side; drawing comes first, without adapters."""
    torch = _import_module("torch")

    dtype = getattr(torch, pipeline.base.unet.dtype)
    drawer = _make_diffusers_pipeline(pipeline, device, dtype)
    texts = [
        torch.tensor(np.asarray(pipeline.tokenizer.encode([text])), device=device, dtype=torch.long)
        for text in (_PROMPT, "")
    ]

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def draw() -> None:
        with torch.no_grad():
            prompt, empty = (drawer.text_encoder(ids)[0] for ids in texts)
        drawer(
            prompt_embeds=prompt,
            negative_prompt_embeds=empty,
            num_images_per_prompt=pictures,
            num_inference_steps=_SAMPLING_STEPS,
            guidance_scale=pipeline.guidance,
            output_type="np",
        )
        synchronize()

    seconds = {"drawing": _time_second_run(draw)}
    views = torch.tensor(image, device=device, dtype=dtype).permute(2, 0, 1)[None].repeat(_VIEWS, 1, 1, 1) / 127.5 - 1.0
    _add_lora(drawer.unet)

    def tune() -> None:
        _tune_lora(drawer, views, texts[0], steps, pipeline.memory.draws)
        synchronize()

    return {"tuning": _time_second_run(tune), **seconds}


def _make_diffusers_pipeline(pipeline: Pipeline, device: str, dtype: Any) -> Any:
    """A `StableDiffusionPipeline` of a pipeline's sizes with random weights."""
    diffusers = _import_module("diffusers")
    torch = _import_module("torch")
    transformers = _import_module("transformers")

    base = pipeline.base
    configs = {name: getattr(base, name).config.to_dict() for name in ("unet", "vae", "text")}
    with torch.device(device):
        unet = diffusers.UNet2DConditionModel.from_config(configs["unet"])
        vae = diffusers.AutoencoderKL.from_config(configs["vae"])
        text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**configs["text"]))
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    networks = [network.to(device, dtype).requires_grad_(False) for network in (vae, text, unet)]
    drawer = diffusers.StableDiffusionPipeline(
        vae=networks[0],
        text_encoder=networks[1],
        tokenizer=None,
        unet=networks[2],
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    drawer.set_progress_bar_config(disable=True)
    return drawer


def _add_lora(unet: Any) -> None:
    peft = _import_module("peft")
    torch = _import_module("torch")

    unet.add_adapter(peft.LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=_PROJECTIONS))
    _import_module("diffusers.training_utils").cast_training_params(unet, dtype=torch.float32)


def _tune_lora(drawer: Any, views: Any, ids: Any, steps: int, batch: int) -> None:
    """LoRA steps as in diffusers' training script, on latents and a prompt that are encoded once."""
    torch = _import_module("torch")

    device, dtype = views.device, views.dtype
    with torch.no_grad():
        latents = drawer.vae.encode(views).latent_dist.sample() * drawer.vae.config.scaling_factor
        context = drawer.text_encoder(ids)[0].repeat(batch, 1, 1)
    trained = [parameter for parameter in drawer.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE)
    for _ in range(steps):
        clean = latents[torch.randint(len(latents), (batch,), device=device)]
        noise, t = torch.randn_like(clean), torch.randint(1000, (batch,), device=device)
        noisy = drawer.scheduler.add_noise(clean, noise, t).to(dtype)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            prediction = drawer.unet(noisy, t, context).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), noise.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _import_module(name: str) -> Any:
    """A module of a package that need not be installed."""
    return importlib.import_module(name)


def _time_second_run(run: Callable[[], None]) -> float:
    """Seconds of the second of two runs: the first one compiles, or chooses its kernels."""
    run()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
