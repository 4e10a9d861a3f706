"""The embedded world's denoiser: velocity prediction on 8 x 8 latents, a schedule that ends in pure noise."""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """`full` made the shipped weights; `smoke` runs end to end in seconds."""
    config = ConfigDict(
        {
            "stage": "unet",
            "base": "runs/toyworld/base",
            "output": "runs/toyworld/model",
            "initial": "",
            "data": {"count": 120_000, "size": 32, "flat": 0.7},
            "model": {
                "block_out_channels": (96, 160),
                "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                "layers_per_block": 1,
                "attention_head_dim": 4,
                "norm_num_groups": 16,
            },
            "schedule": {
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "prediction_type": "v_prediction",
                "timestep_spacing": "trailing",
                "rescale_betas_zero_snr": True,
                "clip_sample": False,
                "set_alpha_to_one": True,
                "steps_offset": 1,
            },
            "gamma": 5.0,
            "dropout": 0.1,
            "batch_size": 64,
            "steps": 11_600,
            "seed": 2,
            "ema": 0.9995,
            "optim": {
                "lr": 1.2e-3,
                "schedule": "stable",
                "warmup": 500,
                "decay": 0.3,
                "weight_decay": 0.01,
                "no_decay": "bias|norm|class_embedding|logit_scale",
                "clip": 1.0,
                "b1": 0.9,
                "b2": 0.99,
            },
            "mesh": {"data": -1, "fsdp": 1},
            "threads": 2,
            "max_bad_steps": 20,
            "log_every": 100,
            "preview_every": 1000,
            "checkpoint_every": 0,
            "checkpoint_minutes": 5.0,
            "keep": 2,
            "best": {"metric": "", "mode": "max"},
        }
    )
    if variant == "smoke":  # and leaves the results of the full one alone
        config.base = "runs/smoke/base"
        config.output = "runs/smoke/model"
        config.data.count = 64
        config.model.update(block_out_channels=(16,), attention_head_dim=2)
        config.model.update(down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
        config.batch_size, config.steps, config.preview_every, config.log_every = 8, 4, 0, 2
    return config
