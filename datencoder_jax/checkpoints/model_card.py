"""The model card of an exported concept: what it is, its pictures and scores, and how other programs use it."""

import html
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence

from datencoder_jax.checkpoints.embedding_files import DIFFUSERS_FILE, diffusers_token, each
from datencoder_jax.checkpoints.hub import TOYWORLD
from datencoder_jax.printable import escape_hidden
from datencoder_jax.typing import Concept, Gated, Residual

MARK = "<!-- made by datencoder -->"
"""A line that every card has and nobody sees, by which a card may be replaced."""

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_BASE_FOLDER = "<folder of the base model in diffusers' format>"

_DUAL_PATH = """## diffusers, exactly as it was tuned

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({base}, custom_pipeline="<this folder>", trust_remote_code=True)
pipe.load_concept("<this folder>/concept.safetensors")
pipe({prompt}).images[0].save("picture.png")
```

`trust_remote_code=True` lets diffusers run Python code of others: `pipeline.py` of this folder, and whatever code comes
with the base model, {source}, which the concept's file names. Read the one, and trust whoever publishes the other.
"""

_PLAIN = """## diffusers, {plain_way}

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({base})
{lora}{embedding}
pipe({plain_prompt}).images[0].save("picture.png")
```
"""

_LOAD_LORA = 'pipe.load_lora_weights("<this folder>", weight_name="pytorch_lora_weights.safetensors")\n'
_LOAD_ONE = 'pipe.load_textual_inversion("<this folder>/{file}")'
_LOAD_TWO = """
from safetensors.torch import load_file

vectors = load_file("<this folder>/{file}")
for part, encoder, words in (
    ("clip_l", pipe.text_encoder, pipe.tokenizer),
    ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
):
    pipe.load_textual_inversion(vectors[part], token={token}, text_encoder=encoder, tokenizer=words)"""

_INTERFACES = """## ComfyUI

Put {embedding} into `models/embeddings`{lora_place} Prompt: `a photo of a {nodes} on the beach`{lora_node}

## A1111, Forge

Put {embedding} into `embeddings`{lora_folder} Prompt: `a photo of a {words} on the beach{lora_tag}`
"""


def model_card(
    concept: Concept,
    *,
    name: str,
    files: Collection[str],
    encoders: int,
    scores: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """The text of `README.md`, with the front matter of a Hugging Face model card.

    Args:
        name: what the files for user interfaces are called.
        files: names of the exported files; only what can be done with them is told.
        encoders: how many text encoders the base model has.
        scores: numbers by their names, by path ("dual path", "soft path").
    """
    tokens = [diffusers_token(token, count) for token, count in concept.placeholders.items()]
    prompt, plain = f"a photo of a {concept.subject}", " and a ".join(tokens)
    words = [file.removesuffix(".safetensors") for file, *_ in each(concept, f"{name}_emb.safetensors")]
    values = {
        "base": _quoted(concept.base if _on_hub(concept.base) else _BASE_FOLDER),
        "source": _escaped(concept.base) if _on_hub(concept.base) else "in the folder that you put there",
        "prompt": _quoted(f"{prompt} on the beach"),
        "plain_prompt": _quoted(f"a photo of a {plain} on the beach"),
        "plain_way": "the soft path alone" if concept.blend < 1 else "without a custom pipeline",
    }
    sections = [_front_matter(concept, prompt, files, encoders), f"{MARK}\n", _introduction(concept, name, files)]
    if scores:
        sections.append(_table(scores))
    if "pipeline.py" in files:
        sections.append(_DUAL_PATH.format(**values))
    embeds = [file for file, *_ in each(concept, DIFFUSERS_FILE)]
    if set(embeds) <= set(files):
        lora = _LOAD_LORA if "pytorch_lora_weights.safetensors" in files else ""
        load = _LOAD_ONE if encoders == 1 else _LOAD_TWO
        pairs = zip(embeds, tokens, strict=True)
        embedding = "\n".join(load.format(file=file, token=_quoted(token)) for file, token in pairs)
        sections.append(_PLAIN.format(**values, lora=lora, embedding=embedding))
    if {f"{word}.safetensors" for word in words} <= set(files):
        sections.append(_interfaces(name, words, f"{name}.safetensors" in files))
    return "\n".join(sections)


def _on_hub(base: str) -> bool:
    """Whether `base` names a repository of the Hugging Face Hub, not a place on the machine the concept was made on."""
    return bool(_REPOSITORY.fullmatch(base)) and not base.lower().endswith(".safetensors") and not os.path.exists(base)


def base_name(base: str) -> str:
    """What a base model is called where others read it: its repository, or the last part of a path on this machine."""
    return base if _on_hub(base) else re.split(r"[/\\]", base.rstrip("/\\"))[-1] or base


def _front_matter(concept: Concept, prompt: str, files: Collection[str], encoders: int) -> str:
    family = "stable-diffusion" if encoders == 1 else "stable-diffusion-xl"
    lora = ["lora"] if concept.offsets else []
    quoted = _quoted(prompt)
    lines = ["---"]
    if _on_hub(concept.base):
        lines.append(f"base_model: {concept.base}")
    lines += ["library_name: diffusers", "tags:"]
    lines += [f"- {tag}" for tag in ("text-to-image", family, "diffusers", *lora, "textual-inversion")]
    lines += [f"instance_prompt: {quoted}", "widget:", f"- text: {quoted}"]
    if "samples.png" in files:
        lines += ["  output:", "    url: samples.png"]
    return "\n".join([*lines, "---", ""])


def _introduction(concept: Concept, name: str, files: Collection[str]) -> str:
    made = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in sorted(concept.metadata.items()))
    base = _escaped(base_name(concept.base))
    tokens = " and ".join(map(_code, concept.placeholders))
    picture = "\n![Samples](samples.png)\n" if "samples.png" in files else ""
    return f"""# {name}

A concept of one particular thing, for text-to-image models on {base} (weights {_escaped(concept.fingerprint[:8])}).
In prompts it is {tokens}, where a plain one has "{_escaped(concept.nearest_word)}".
{_nowhere_else(concept)}{picture}
Made with: {_escaped(made) or "settings that were not kept"}.

{_paths(concept)}"""


def _nowhere_else(concept: Concept) -> str:
    if concept.base != TOYWORLD:
        return ""
    return (
        "That model is embedded in datencoder_jax, and no other program has it: files for them show their form alone.\n"
    )


def _paths(concept: Concept) -> str:
    if concept.reader is not None:
        return "Its embedding is predicted anew at every step of drawing, which no file for other programs can hold.\n"
    if any(isinstance(edit, Residual) for edit in concept.offsets.values()):
        return "It adds to the values of layers where the concept stands, which no file for other programs can hold.\n"
    if any(isinstance(edit, Gated) for edit in concept.offsets.values()):
        return """It changes what layers give where the concept stands, which is no change of weights: files for other
programs hold its embedding alone, and draw something less alike.
"""
    if concept.blend == 1:
        return "The concept has one path, and LoRA and embedding files hold all of it.\n"
    word = _escaped(concept.nearest_word)
    return f"""The concept is drawn along two paths, which every attention layer blends: {concept.blend:g} of the soft
path, which has the concept, and {1 - concept.blend:g} of the hard path, the base model reading
"{word}". The two together are not a change of weights, so LoRA and embedding files hold the soft path
alone, and that is what user interfaces, and diffusers without `pipeline.py`, draw.
"""


def _quoted(text: str) -> str:
    """`text` as a string of Python, JSON and YAML."""
    return escape_hidden(json.dumps(text, ensure_ascii=False))


def _escaped(text: str) -> str:
    """`text` so that Markdown and HTML show it as it is, without links, names of users or signs of its own."""
    text = re.sub(r"[\\`*_{}\[\]()#!|~$@:]|(?<=www)\.", r"\\\g<0>", escape_hidden(text), flags=re.IGNORECASE)
    return html.escape(text, quote=False)


def _code(text: str) -> str:
    """`text` as code, in which Markdown shows everything as it is: a run of more backticks than it has around it."""
    runs = re.findall("`+", text)
    if not runs:
        return f"`{escape_hidden(text)}`"
    fence = "`" * (1 + max(map(len, runs)))
    return f"{fence} {escape_hidden(text)} {fence}"


def _table(scores: Mapping[str, Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(name for row in scores.values() for name in row))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for path, row in scores.items():
        cells = (f"{row[name]:.3f}" if name in row else "" for name in names)
        lines.append(f"| {path} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _interfaces(name: str, words: Sequence[str], lora: bool) -> str:
    return _INTERFACES.format(
        words=" and a ".join(words),
        nodes=" and a ".join(f"embedding:{word}" for word in words),
        embedding=", ".join(f"`{word}.safetensors`" for word in words),
        lora_place=f" and `{name}.safetensors` into `models/loras`." if lora else ".",
        lora_node=", after a Load LoRA node of strength 1." if lora else ".",
        lora_folder=f" and `{name}.safetensors` into `models/Lora`." if lora else ".",
        lora_tag=f" <lora:{name}:1>" if lora else "",
    )
