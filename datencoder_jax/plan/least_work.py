"""The least arithmetic that tuning and sampling can take, from a UNet's configuration alone.

Nothing here looks at the code of the UNet. At a level of `s` by `s` latent pixels (`n = s^2`) and width `c`, with `l`
text tokens of width `d`, one sample takes, a multiplication and an addition being two operations,

    residual block, c' -> c    2 n (9 c' c + 9 c c + [c' c if c' != c]) + 2 e c                     (1)
    transformer block          2 n c (3 c + c) + 4 n^2 c                      self-attention         (2)
                             + 2 n c (c + c) + 2 l d (2 c) + 4 n l c          cross-attention        (3)
                             + 2 n (8 c c + 4 c c)                            gated feed-forward     (4)

and the projections around a transformer 4 n c^2. A second path adds one more softmax product to (2) and (3), and the
keys and values of one prompt, which all samples share. The gradient by the input has the products of the forward pass
once more and no gradient of any weight; fused attention's is 10/4 of its forward pass (`plan.work`).
"""

from dataclasses import dataclass

from datencoder_jax.models.unet import UNetConfig


@dataclass
class LeastWork:
    """Operations of one sample: of products and convolutions, of attention, and of keys and values of one prompt."""

    products: float = 0.0
    attention: float = 0.0
    prompt: float = 0.0

    def forward(self, samples: int, *, paths: int = 1) -> float:
        """Operations of a forward pass of `samples`; a second path adds an attention for each and a prompt for all."""
        return samples * (self.products + paths * self.attention) + paths * self.prompt

    def input_gradient(self, samples: int, *, paths: int = 1) -> float:
        """Operations of the gradient by latents and adapters, without the forward pass."""
        return samples * (self.products + 2.5 * paths * self.attention)


def least_work(config: UNetConfig, side: int, tokens: int = 77) -> LeastWork:
    """The least work of a UNet on latents of `side` pixels, equations (1) to (4).

    Args:
        tokens: of a prompt.
    """
    work, channels, levels = LeastWork(), config.block_out_channels, len(config.block_out_channels)
    embedding = 4 * channels[0]
    work.products += 2 * side**2 * 9 * channels[0] * (config.in_channels + config.out_channels)
    work.products += 2 * (channels[0] * embedding + embedding**2)
    skips, previous = [channels[0]], channels[0]
    for level, width in enumerate(channels):
        n = (side // 2**level) ** 2
        for _ in range(config.layers_per_block):
            _add_residual_block(work, n, previous, width, embedding)
            if config.down_block_types[level].startswith("CrossAttn"):
                _add_transformer(work, config, level, n, tokens)
            previous = width
            skips.append(width)
        if level < levels - 1:
            work.products += 2 * (n // 4) * 9 * width**2
            skips.append(width)
    n = (side // 2 ** (levels - 1)) ** 2
    for _ in range(2):
        _add_residual_block(work, n, previous, previous, embedding)
    _add_transformer(work, config, levels - 1, n, tokens)
    for index, width in enumerate(reversed(channels)):
        level = levels - 1 - index
        n = (side // 2**level) ** 2
        for _ in range(config.layers_per_block + 1):
            _add_residual_block(work, n, previous + skips.pop(), width, embedding)
            if config.up_block_types[index].startswith("CrossAttn"):
                _add_transformer(work, config, level, n, tokens)
            previous = width
        if level:
            work.products += 2 * (4 * n) * 9 * width**2
    return work


def _add_residual_block(work: LeastWork, n: int, inputs: int, outputs: int, embedding: int) -> None:
    work.products += 2 * n * (9 * inputs * outputs + 9 * outputs**2 + (inputs * outputs if inputs != outputs else 0))
    work.products += 2 * embedding * outputs


def _add_transformer(work: LeastWork, config: UNetConfig, level: int, n: int, tokens: int) -> None:
    width = config.block_out_channels[level]
    work.products += 2 * 2 * n * width**2
    for _ in range(config.depth(level)):
        work.products += 2 * n * width**2 * (4 + 2 + 12)
        work.attention += 4 * n**2 * width + 4 * n * tokens * width
        work.prompt += 2 * tokens * config.cross_attention_dim * 2 * width
