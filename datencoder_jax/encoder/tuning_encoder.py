"""The tuning-encoder: a token embedder and a hypernetwork that read one memory of features.

    m = LN [ LeakyReLU(mean_j W_j c_j),  W_d LN(denoiser),  W_t phi(t),  W_p patch_1, ..., W_p patch_P ]        (1)
    s = Blocks(queries; m)          one learned query for v*, one for every projection of the inventory         (2)
    v* = a + rho (b + W_v s_0 / sqrt(width))    in units of the token table's mean norm rho                     (3)
    A_l = W_A[shape_l] s_l / sqrt(width in_l),  B_l = W_B[shape_l] s_l / sqrt(width),   W_B = 0 at the start     (4)

The paper (arXiv 2307.06925) says what goes in and what comes out: a word embedding and low-rank offsets of self- and
cross-attention. (1) follows E4T (arXiv 2302.12228). The queries (2), the decoders shared by projections of equal shape
(4), and (3) are ours; every W has a bias. Without anchors `a = 0`, and pretraining starts b in the midst of the words.
With anchors, names of kinds of things, `a` is the vector of the one whose text CLIP finds nearest to the picture: what
CLIP can tell of kinds of things that the encoder never saw need not be learned. Since `B = 0` at the start, an
untrained hypernetwork leaves the base model as it is. The `sqrt(width)` sets the pace: an Adam step of rate r moves an
entry of B by about r sqrt(width), as far as a step of tuning does; without it the first steps bury the base model.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from datencoder_jax.models.config import ConfigMixin
from datencoder_jax.models.dot_product_attention import attend
from datencoder_jax.models.layers import LayerNorm, linear, timestep_features
from datencoder_jax.runtime.precision import exact_products
from datencoder_jax.typing import Features, LowRank, Variables

FEATURES = ("classes", "denoiser", "patches")
"""What an encoder can read of a picture."""


@dataclass(frozen=True)
class EncoderConfig(ConfigMixin):
    """Sizes of the tuning-encoder and of what it reads and fills.

    Attributes:
        vision_width, vision_taps: of the class states.
        denoiser_width: length of the pooled UNet features.
        embedding_dim: width of the token table.
        inventory: `(path, in, out)` of every projection that gets an offset.
        rank: of every offset.
        width, depth, heads: of the transformer that the queries run through.
        reference_norm: `rho`.
        blend: the dual-path weight it was trained with, the default for tuning and sampling.
        patch_taps: from how many of the tapped layers, the last ones, it reads the patch states.
        anchors: how many words `a` is chosen from; 0 for none.
        anchor_dim: width of the space that pictures and the anchors' texts share.
        sees: what of equation (1) it reads beside the timestep; an inventory that is empty means no hypernetwork.
        gains: of the offsets of cross-attention's values and of those of self-attention, in a concept that is not tuned
            (`methods.datencoder`).
        same_cosine: the cosine of predictions for two pictures from which on they count as pictures of the same thing
            (`methods.datencoder`); None for an encoder of which nobody has measured it.
    """

    vision_width: int
    vision_taps: int
    denoiser_width: int
    embedding_dim: int
    inventory: tuple[tuple[str, int, int], ...]
    rank: int = 4
    width: int = 256
    depth: int = 3
    heads: int = 4
    reference_norm: float = 1.0
    blend: float = 0.5
    patch_taps: int = 1
    anchors: int = 0
    anchor_dim: int = 0
    sees: tuple[str, ...] = FEATURES
    gains: tuple[float, float] = (1.0, 1.0)
    same_cosine: float | None = None

    def __post_init__(self):
        if not self.sees or not set(self.sees) <= set(FEATURES):
            raise ValueError(f"sees is {list(self.sees)} and can be of {', '.join(FEATURES)}")
        object.__setattr__(self, "sees", tuple(name for name in FEATURES if name in self.sees))
        object.__setattr__(self, "gains", tuple(float(gain) for gain in self.gains))
        if not all(0.0 <= gain < math.inf for gain in self.gains):
            raise ValueError(f"gains are {self.gains}, and can be numbers of 0 or more")
        if self.same_cosine is not None and not -1.0 <= self.same_cosine <= 1.0:
            raise ValueError(f"same_cosine is {self.same_cosine}, and a cosine is between -1 and 1")
        # JSON has no tuples, and a configuration has to be hashable.
        rows = tuple((str(path), int(inputs), int(outputs)) for path, inputs, outputs in self.inventory)
        object.__setattr__(self, "inventory", rows)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The distinct `(in, out)` of the inventory, sorted."""
        return tuple(sorted({(inputs, outputs) for _, inputs, outputs in self.inventory}))


class _Block(nnx.Module):
    """Pre-normed cross-attention of the queries to the memory, self-attention among queries, and an MLP."""

    def __init__(self, width: int, heads: int, *, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        self.norm_cross, self.norm_self, self.norm_mlp = (LayerNorm(width, epsilon=1e-5, **common) for _ in range(3))
        self.cross_q = linear(width, width, **common)
        self.cross_kv = linear(width, 2 * width, **common)
        self.cross_out = linear(width, width, **common)
        self.self_qkv = linear(width, 3 * width, **common)
        self.self_out = linear(width, width, **common)
        self.mlp_in = linear(width, 4 * width, **common)
        self.mlp_out = linear(4 * width, width, **common)
        self.heads = heads

    def __call__(self, x: jax.Array, memory: jax.Array) -> jax.Array:
        """Queries `[batch, q, width]`, memory `[batch, m, width]` -> `[batch, q, width]`."""
        k, v = jnp.split(self.cross_kv(memory), 2, axis=-1)
        x = x + self.cross_out(self._attend(self.cross_q(self.norm_cross(x)), k, v))
        q, k, v = jnp.split(self.self_qkv(self.norm_self(x)), 3, axis=-1)
        x = x + self.self_out(self._attend(q, k, v))
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(self.norm_mlp(x))))

    def _attend(self, q, k, v):
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in (q, k, v))
        return attend(q, k, v).reshape(*q.shape[:2], -1)


class _Anchors(nnx.Module):
    """`a` of equation (3): texts `keys` in the space shared with pictures, and the token vectors of their words.

    Neither is trained.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        self.keys = nnx.Param(zeros(rngs.params(), (config.anchors, config.anchor_dim)))
        self.vectors = nnx.Param(zeros(rngs.params(), (config.anchors, config.embedding_dim)))

    def __call__(self, projected: jax.Array | None) -> jax.Array:
        """`[batch, p]` -> `[batch, embedding_dim]`; the keys are unit vectors, so no picture needs to be one."""
        if projected is None:
            raise ValueError("this encoder chooses among words by the projection of the picture, which is missing")
        with exact_products():
            best = jnp.argmax(projected @ self.keys.get_value().T, axis=-1)
        return jax.lax.stop_gradient(self.vectors.get_value()[best])


class TuningEncoder(nnx.Module):
    """Equations (1) to (4)."""

    def __init__(self, config: EncoderConfig, *, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        width, rank = config.width, config.rank
        normal = nnx.initializers.normal
        seen = config.vision_width
        if "classes" in config.sees:
            self.class_proj = nnx.List(linear(seen, width, **common) for _ in range(config.vision_taps))
        if "patches" in config.sees:
            self.patch_proj = linear(seen, width, **common)
            self.early_patch_proj = nnx.List(linear(seen, width, **common) for _ in range(config.patch_taps - 1))
        if "denoiser" in config.sees:
            self.denoiser_norm = LayerNorm(config.denoiser_width, epsilon=1e-5, **common)
            self.denoiser_proj = linear(config.denoiser_width, width, **common)
        self.time_proj = linear(width, width, **common)
        self.norm_memory = LayerNorm(width, epsilon=1e-5, **common)
        self.queries = nnx.Param(normal(0.02)(rngs.params(), (1 + len(config.inventory), width)))
        self.blocks = nnx.List(_Block(width, config.heads, **common) for _ in range(config.depth))
        self.norm_out = LayerNorm(width, epsilon=1e-5, **common)
        self.token_head = linear(width, config.embedding_dim, kernel_init=normal(0.02), **common)
        self.down_heads = nnx.List(
            linear(width, rank * inputs, kernel_init=normal(1.0), **common) for inputs, _ in config.shapes
        )
        self.up_heads = nnx.List(
            linear(width, rank * outputs, kernel_init=nnx.initializers.zeros, **common) for _, outputs in config.shapes
        )
        self.anchors = _Anchors(config, rngs=rngs) if config.anchors else None
        self.config = config

    def __call__(self, features: Features) -> Variables:
        """Features of a batch -> one embedding `[batch, 1, embedding_dim]` and one set of offsets per sample."""
        memory = self._memory(features)
        batch = memory.shape[0]
        queries = self.queries.get_value()
        states = jnp.broadcast_to(queries[None], (batch, *queries.shape))
        for block in self.blocks:
            states = block(states, memory)
        states = self.norm_out(states) * self.config.width**-0.5
        embeddings = self.config.reference_norm * self.token_head(states[:, :1])
        if self.anchors is not None:
            embeddings = embeddings + self.anchors(features.projected)[:, None]
        return Variables(embeddings, self._offsets(states[:, 1:]))

    def _memory(self, features: Features) -> jax.Array:
        """Equation (1): `[batch, 1 to 3 + patches, width]`."""
        sees, memory = self.config.sees, []
        if "classes" in sees:
            taps = [project(features.classes[:, j]) for j, project in enumerate(self.class_proj)]
            memory.append(jax.nn.leaky_relu(sum(taps[1:], taps[0]) / len(taps))[:, None])
        if "denoiser" in sees:
            memory.append(self.denoiser_proj(self.denoiser_norm(features.denoiser))[:, None])
        memory.append(self._embed_timesteps(features.t)[:, None])
        if "patches" in sees:
            layers = jnp.split(features.patches, self.config.patch_taps, axis=1)
            projections = [*self.early_patch_proj, self.patch_proj]
            memory += [project(x) for project, x in zip(projections, layers, strict=True)]
        return self.norm_memory(jnp.concatenate(memory, axis=1))

    def _embed_timesteps(self, t: jax.Array) -> jax.Array:
        """`W_t phi(t)` of equation (1), exact: `[batch]` -> `[batch, width]`."""
        with exact_products():
            return self.time_proj(timestep_features(t, self.config.width))

    def _offsets(self, states: jax.Array) -> dict[str, LowRank]:
        """Equation (4), projections of one shape decoded together."""
        offsets, batch, rank = {}, states.shape[0], self.config.rank
        for shape, down_head, up_head in zip(self.config.shapes, self.down_heads, self.up_heads, strict=True):
            inputs, outputs = shape
            rows = [i for i, (_, *io) in enumerate(self.config.inventory) if tuple(io) == shape]
            chosen = states[:, jnp.array(rows)]
            down = down_head(chosen).reshape(batch, len(rows), inputs, rank) * inputs**-0.5
            up = up_head(chosen).reshape(batch, len(rows), rank, outputs)
            for k, row in enumerate(rows):
                offsets[self.config.inventory[row][0]] = LowRank(down[:, k], up[:, k])
        return offsets
