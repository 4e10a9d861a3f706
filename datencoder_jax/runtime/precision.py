"""Products that float32 is needed in, on devices that would compute them in less.

A product (of matrices, or a convolution) of float32 is by default one pass of bfloat16 on TPUs, which keeps 8 bits of
each factor, and TF32 on NVIDIA's GPUs from Ampere on, which keeps 11. That is enough for the layers of a network. It is
not where a product decides something (which word is nearest), where its errors accumulate or are divided by small
numbers (the projections of PaRa and Perfusion, what follows the concept in tuning), or where it measures.

Such code runs in `exact_products()` while it is traced. The setting belongs to the traced products, so their gradients
have it too; it costs nothing on CPUs, six passes in place of one on TPUs.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp


def exact_products(dtype: Any = "float32") -> AbstractContextManager:
    """A context manager in which products of float32 are computed in float32 on every device.

    `jnp.linalg.qr`, `eigh` and `pinv` are algorithms in float32 on every device; XLA's and JAX's own for TPUs ask for
    the highest precision themselves. Products in the derivative of `qr` do not, unless it is traced in here.

    Args:
        dtype: the type that a network computes in; of others than float32 nothing changes, since their products have
            no more precise form.
    """
    if jnp.dtype(dtype) != jnp.float32:
        return nullcontext()
    return jax.default_matmul_precision("highest")
