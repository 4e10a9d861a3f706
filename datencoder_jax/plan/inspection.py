"""Properties of a compiled program, read from its text: what no number of a plan shows.

A program that silently calls back into Python, multiplies in float32 what was meant to be bfloat16, copies a state that
it was given to overwrite, or gathers a whole batch on every device is as right as any other, and slow.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from datencoder_jax.plan import hlo

_CALLBACK = re.compile(r'custom_call_target="[^"]*callback[^"]*"|\b(?:infeed|outfeed)\(|is_host_transfer=true')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


@dataclass(frozen=True)
class Product:
    """A matrix product or a convolution of a compiled program.

    Attributes:
        frames: functions of this package that it comes from, the innermost first, such as "base.py:Base.vision_input";
            empty if the text does not tell.
        operation: JAX's name of it.
        operands: types of the two factors, such as ("bf16", "bf16").
        times: how often it runs.
        exact: whether the program asks for the highest precision: accelerators round the factors of others.
    """

    frames: tuple[str, ...]
    operation: str
    operands: tuple[str, ...]
    times: int
    exact: bool

    def is_of(self, places: Collection[str]) -> bool:
        """Whether it comes from one of these files and functions, directly or through what they call."""
        return any(frame.startswith(tuple(places)) for frame in self.frames)


def host_callbacks(text: str) -> list[str]:
    """Places where a program calls its host."""
    return _CALLBACK.findall(text)


def fused_attention(text: str) -> tuple[int, int]:
    """How many fused attentions a program's text has, forward and backward: cuDNN's, or the kernels of a TPU."""
    targets = Counter(_TARGET.findall(text))
    kernels = re.findall(r'custom_call_target="tpu_custom_call".*?op_name="([^"]*)"', text)
    flash = [name for name in kernels if "flash_attention" in name]
    # The gradient has two kernels, one for queries and one for keys and values.
    backward = sum("_bwd_dq" in name for name in flash)
    forward = sum("_bwd_" not in name for name in flash)
    return targets["__cudnn$fmhaSoftmax"] + forward, targets["__cudnn$fmhaSoftmaxBackward"] + backward


def aliased_outputs(text: str) -> int:
    """How many of a program's outputs take the place of an argument."""
    header = text.split("\n", 1)[0]
    return len(re.findall(r"\{[\d, ]*\}: \(\d+, \{[\d, ]*\}, (?:may|must)-alias\)", header))


def products(text: str) -> Iterator[Product]:
    """Matrix products and convolutions that a program runs, library calls among them."""
    frames = _Frames(text)
    for step in hlo.executed(text):
        instruction = step.instruction
        target = _TARGET.search(instruction.attributes)
        library = target is not None and target[1].startswith(("__cublas", "__cudnn$conv"))
        if not library and instruction.opcode not in ("dot", "convolution"):
            continue
        shapes = (step.computation.instructions[name].shape for name in instruction.operands[:2])
        types = tuple(hlo.arrays(shape)[0][0] for shape in shapes)
        operation = re.search(r'op_name="([^"]*)"', instruction.attributes)
        exact = "highest,highest" in re.sub(r'["\s]', "", instruction.attributes).lower()
        name = operation[1] if operation else ""
        yield Product(frames.functions(instruction.attributes), name, types, step.times, exact)


def float32_products(text: str, allowed: Collection[str] = ()) -> Counter[str]:
    """How often products of two float32 factors run, by the innermost function that they come from.

    Args:
        allowed: files ("encoder/") and functions ("base.py:Base.vision_input") of the package whose products, direct or
            through what they call, are meant to be float32.
    """
    return _count(product for product in _float32(text) if not product.is_of(allowed))


def rounded_products(text: str, places: Collection[str]) -> Counter[str]:
    """How often products of two float32 factors run that do not ask for the highest precision.

    Args:
        places: files and functions of the package, as for `float32_products`; products of others are not counted.
    """
    return _count(product for product in _float32(text) if product.is_of(places) and not product.exact)


def _float32(text: str) -> Iterator[Product]:
    return (product for product in products(text) if product.operands == ("f32", "f32"))


def _count(found: Iterable[Product]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for product in found:
        counts[product.frames[0] if product.frames else product.operation] += product.times
    return counts


class _Frames:
    """The table of Python's call stacks at the head of a compiled program."""

    def __init__(self, text: str):
        self._files = self._table(text, "FileNames", r'(\d+) "([^"]*)"')
        self._functions = self._table(text, "FunctionNames", r'(\d+) "([^"]*)"')
        self._locations = self._table(text, "FileLocations", r"(\d+) \{file_name_id=(\d+) function_name_id=(\d+)")
        frames = self._table(text, "StackFrames", r"(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")
        # A parent's number is one more than the frame's, so that 1 is none.
        self._frames = {key: (value[0], str(int(value[1] or 1) - 1)) for key, value in frames.items()}

    @staticmethod
    def _table(text: str, name: str, row: str) -> dict[str, tuple]:
        start = text.find(f"\n{name}\n")
        if start < 0:
            return {}
        block = text[start + len(name) + 2 :].split("\n\n", 1)[0]
        return {match[1]: match.groups()[1:] for match in re.finditer(rf"^{row}", block, re.MULTILINE)}

    def functions(self, attributes: str) -> tuple[str, ...]:
        """The functions of this package that an instruction comes from, the innermost first."""
        match = re.search(r"stack_frame_id=(\d+)", attributes)
        frame, functions = match[1] if match else "", []
        while frame in self._frames:
            location, frame = self._frames[frame]
            file, function = self._locations.get(location, ("", ""))
            path = self._files.get(file, ("",))[0]
            if "datencoder_jax/" in path:
                functions.append(f"{path.rpartition('datencoder_jax/')[2]}:{self._functions.get(function, ('',))[0]}")
        return tuple(functions)
