"""Stable Diffusion's original modules as lists of tensors: names and shapes as its training code builds them.

Written from the structure of that code (blocks appended to numbered lists), not from any table of renamings: it is what
the renaming is tested against.
"""

from itertools import pairwise

Shapes = dict[str, tuple[int, ...]]


def _affine(name: str, *shape: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def _resnet(name: str, inputs: int, outputs: int, time: int) -> Shapes:
    shapes = _affine(f"{name}.in_layers.0", inputs) | _affine(f"{name}.in_layers.2", outputs, inputs, 3, 3)
    shapes |= _affine(f"{name}.emb_layers.1", outputs, time)
    shapes |= _affine(f"{name}.out_layers.0", outputs) | _affine(f"{name}.out_layers.3", outputs, outputs, 3, 3)
    return shapes | (_affine(f"{name}.skip_connection", outputs, inputs, 1, 1) if inputs != outputs else {})


def _transformer(name: str, width: int, depth: int, context: int, linear: bool) -> Shapes:
    ones = () if linear else (1, 1)
    shapes = _affine(f"{name}.norm", width)
    for side in ("proj_in", "proj_out"):
        shapes |= _affine(f"{name}.{side}", width, width, *ones)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for attention, inputs in (("attn1", width), ("attn2", context)):
            shapes |= _affine(f"{block}.{attention}.to_q", width, width, bias=False)
            shapes |= _affine(f"{block}.{attention}.to_k", width, inputs, bias=False)
            shapes |= _affine(f"{block}.{attention}.to_v", width, inputs, bias=False)
            shapes |= _affine(f"{block}.{attention}.to_out.0", width, width)
        shapes |= _affine(f"{block}.ff.net.0.proj", 8 * width, width) | _affine(f"{block}.ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            shapes |= _affine(f"{block}.{norm}", width)
    return shapes


def unet(
    *,
    channels: int = 320,
    multiples: tuple[int, ...] = (1, 2, 4, 4),
    depths: tuple[int, ...] = (1, 1, 1, 0),
    middle: int = 1,
    blocks: int = 2,
    context: int = 768,
    linear: bool = False,
    added: int | None = None,
) -> Shapes:
    """The UNet; `depths` are transformer blocks per level, `added` the width of XL's pooled text and sizes."""
    time = 4 * channels
    shapes = _affine("time_embed.0", time, channels) | _affine("time_embed.2", time, time)
    if added:
        shapes |= _affine("label_emb.0.0", time, added) | _affine("label_emb.0.2", time, time)
    shapes |= _affine("input_blocks.0.0", channels, 4, 3, 3)
    number, width, skips = 1, channels, [channels]
    for level, (multiple, depth) in enumerate(zip(multiples, depths, strict=True)):
        for _ in range(blocks):
            shapes |= _resnet(f"input_blocks.{number}.0", width, multiple * channels, time)
            width = multiple * channels
            if depth:
                shapes |= _transformer(f"input_blocks.{number}.1", width, depth, context, linear)
            skips.append(width)
            number += 1
        if level < len(multiples) - 1:
            shapes |= _affine(f"input_blocks.{number}.0.op", width, width, 3, 3)
            skips.append(width)
            number += 1
    shapes |= _resnet("middle_block.0", width, width, time)
    shapes |= _transformer("middle_block.1", width, middle, context, linear)
    shapes |= _resnet("middle_block.2", width, width, time)
    number = 0
    for level, (multiple, depth) in reversed(list(enumerate(zip(multiples, depths, strict=True)))):
        for i in range(blocks + 1):
            shapes |= _resnet(f"output_blocks.{number}.0", width + skips.pop(), multiple * channels, time)
            width, layer = multiple * channels, 1
            if depth:
                shapes |= _transformer(f"output_blocks.{number}.1", width, depth, context, linear)
                layer = 2
            if level and i == blocks:
                shapes |= _affine(f"output_blocks.{number}.{layer}.conv", width, width, 3, 3)
            number += 1
    return shapes | _affine("out.0", channels) | _affine("out.2", 4, channels, 3, 3)


def _vae_resnet(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = _affine(f"{name}.norm1", inputs) | _affine(f"{name}.conv1", outputs, inputs, 3, 3)
    shapes |= _affine(f"{name}.norm2", outputs) | _affine(f"{name}.conv2", outputs, outputs, 3, 3)
    return shapes | (_affine(f"{name}.nin_shortcut", outputs, inputs, 1, 1) if inputs != outputs else {})


def _vae_middle(name: str, width: int) -> Shapes:
    shapes = _vae_resnet(f"{name}.block_1", width, width) | _vae_resnet(f"{name}.block_2", width, width)
    shapes |= _affine(f"{name}.attn_1.norm", width)
    for layer in ("q", "k", "v", "proj_out"):
        shapes |= _affine(f"{name}.attn_1.{layer}", width, width, 1, 1)
    return shapes


def vae(*, channels: int = 128, multiples: tuple[int, ...] = (1, 2, 4, 4), blocks: int = 2) -> Shapes:
    """The autoencoder of four latent channels."""
    widths = [multiple * channels for multiple in multiples]
    shapes = _affine("quant_conv", 8, 8, 1, 1) | _affine("post_quant_conv", 4, 4, 1, 1)
    shapes |= _affine("encoder.conv_in", channels, 3, 3, 3)
    for level, (inputs, outputs) in enumerate(pairwise([channels, *widths])):
        for i in range(blocks):
            shapes |= _vae_resnet(f"encoder.down.{level}.block.{i}", outputs if i else inputs, outputs)
        if level < len(widths) - 1:
            shapes |= _affine(f"encoder.down.{level}.downsample.conv", outputs, outputs, 3, 3)
    top = widths[-1]
    shapes |= _vae_middle("encoder.mid", top) | _affine("encoder.norm_out", top)
    shapes |= _affine("encoder.conv_out", 8, top, 3, 3)
    shapes |= _affine("decoder.conv_in", top, 4, 3, 3) | _vae_middle("decoder.mid", top)
    inputs = top
    for level, outputs in reversed(list(enumerate(widths))):
        for i in range(blocks + 1):
            shapes |= _vae_resnet(f"decoder.up.{level}.block.{i}", outputs if i else inputs, outputs)
        inputs = outputs
        if level:
            shapes |= _affine(f"decoder.up.{level}.upsample.conv", outputs, outputs, 3, 3)
    return shapes | _affine("decoder.norm_out", channels) | _affine("decoder.conv_out", 3, channels, 3, 3)


def _blocks(name: str, width: int, layers: int) -> Shapes:
    shapes = {}
    for i in range(layers):
        block = f"{name}.resblocks.{i}"
        shapes |= _affine(f"{block}.ln_1", width) | _affine(f"{block}.ln_2", width)
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= _affine(f"{block}.attn.out_proj", width, width)
        shapes |= _affine(f"{block}.mlp.c_fc", 4 * width, width) | _affine(f"{block}.mlp.c_proj", width, 4 * width)
    return shapes


def open_clip_text(*, width: int, layers: int, words: int = 49408, projection: int | None = None) -> Shapes:
    """OpenCLIP's text tower."""
    shapes: Shapes = {"positional_embedding": (77, width), "text_projection": (width, projection or width)}
    shapes |= {"token_embedding.weight": (words, width), "logit_scale": ()}
    return shapes | _blocks("transformer", width, layers) | _affine("ln_final", width)


def clip_text(*, width: int, layers: int, words: int = 49408) -> Shapes:
    """CLIP's text tower as transformers names it."""
    shapes = _affine("text_model.embeddings.token_embedding", words, width, bias=False)
    shapes |= _affine("text_model.embeddings.position_embedding", 77, width, bias=False)
    for i in range(layers):
        layer = f"text_model.encoder.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _affine(f"{layer}.self_attn.{projection}", width, width)
        shapes |= _affine(f"{layer}.layer_norm1", width) | _affine(f"{layer}.layer_norm2", width)
        shapes |= _affine(f"{layer}.mlp.fc1", 4 * width, width) | _affine(f"{layer}.mlp.fc2", width, 4 * width)
    return shapes | _affine("text_model.final_layer_norm", width)


def checkpoint(**parts: Shapes) -> Shapes:
    """A file: the tensors of its parts, `unet`, `vae` and those named by what comes before their names."""
    prefixes = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
    return {f"{prefixes.get(name, name)}{key}": s for name, shapes in parts.items() for key, s in shapes.items()}
