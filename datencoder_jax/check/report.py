"""A check as a table for people, as JSON, and as a row for a table of devices."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from datencoder_jax.check.part import Comparison, Part
from datencoder_jax.check.speed import STAGES

SCHEMA = 1
"""Version of the JSON's layout; it grows when a name changes its meaning."""

ROW_HEADER = (
    "| device | jax | attention, largest deviation | concept, 1 - cosine | prediction, s cold / warm | drawing "
    "| tuning | peak memory, GB | share of peak, drawing / tuning | pretraining, batch: s | diffusers / ours, drawing "
    "/ tuning | date |\n" + "|---" * 12 + "|"
)


def describe_check(parts: Sequence[Part], *, quick: bool, minutes: float) -> dict[str, Any]:
    """The content of `check.json`."""
    return {
        "schema": SCHEMA,
        "datencoder_jax": metadata.version("datencoder_jax"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "minutes": minutes,
        "passed": all(part.passed for part in parts),
        "parts": {part.name: part.to_dict() for part in parts},
    }


def format_table(parts: Sequence[Part]) -> str:
    """A line per part, with what it measured under it."""
    lines = []
    for part in parts:
        lines.append(f"{part.name:<12}  {part.status:<8}  {part.seconds:6.1f} s")
        details = _describe_values(part)
        if part.left_out is not None or part.failure is not None:
            details.append(part.left_out or part.failure or "")
        details += [_describe_failure(comparison) for comparison in part.outcome.comparisons if not comparison.passed]
        lines += [f"  {line}" for line in details]
    return "\n".join(lines)


def _describe_failure(comparison: Comparison) -> str:
    return f"{comparison.name} deviates by {comparison.deviation:.2g}, more than {comparison.tolerance:.2g}"


def _describe_values(part: Part) -> list[str]:
    values = part.outcome.values
    if not values:
        return []
    if part.name == "versions":
        return _describe_versions(values)
    if part.name == "attention":
        return [f"{name}: {_number(value)}" for name, value in values["largest_deviation"].items()]
    if part.name == "concept":
        return [f"nearest word {values['nearest_word']}"] + [
            f"{comparison.name}: {comparison.deviation:.2g} (at most {comparison.tolerance:.2g})"
            for comparison in part.outcome.comparisons
            if comparison.tolerance
        ]
    if part.name == "speed":
        stages = values["stages"]
        lines = [f"{values['model']}, {values['resolution']} px, {values['dtype']}"]
        return lines + [f"{name}: {_describe_timing(stages[name])}" for name in STAGES]
    if part.name == "pretraining":
        return [f"batch {values['batch']}: {_describe_timing(values)}, {values['images_per_second']:.3g} images/s"]
    return [
        f"{name}: ours {values['seconds'][name]:.3g} s, diffusers {values['diffusers_seconds'][name]:.3g} s, "
        f"ratio {ratio:.2f}"
        for name, ratio in values["ratio"].items()
    ]


def _describe_versions(values: Mapping[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {version}" for name, version in values["packages"].items())
    capability = f", compute capability {values['compute_capability']}" if values["compute_capability"] else ""
    memory = f", {values['memory_bytes'] / 1e9:.1f} GB" if values["memory_bytes"] else ""
    driver = f", driver {values['driver']}" if values["driver"] else ""
    cores = f", {values['cores']} cores" if values["platform"] == "cpu" else ""
    lines = [f"{values['devices']} x {values['device']} ({values['platform']}{cores}){capability}{memory}{driver}"]
    lines += [f"python {values['python']}, {packages}"]
    extra = [f"{name} {version}" for name, version in values["accelerator_packages"].items()]
    return [*lines, *([", ".join(extra)] if extra else []), *([values["note"]] if values["note"] else [])]


def _describe_timing(values: Mapping[str, Any]) -> str:
    parts = [
        f"{values['cold_seconds']:.3g} s cold ({values['compile_seconds']:.3g} s compiling), "
        f"{values['warm_seconds']:.3g} s warm",
        f"{values['tflop']:.3g} TFLOP",
    ]
    if values["share_of_peak"] is not None:
        parts.append(f"planned {values['least_seconds']:.3g} s at least, {values['share_of_peak']:.0%} of the peak")
    if values["peak_bytes"] is not None:
        parts.append(f"peak {values['peak_bytes'] / 1e9:.1f} GB")
    return ", ".join(parts)


def format_row(parts: Sequence[Part]) -> str:
    """A row under `ROW_HEADER`; a dash stands where a part has no values."""
    values = {part.name: part.outcome.values for part in parts}
    versions, stages = values.get("versions", {}), values.get("speed", {}).get("stages", {})
    step, ratio = values.get("pretraining", {}), values.get("diffusers", {}).get("ratio", {})
    deviations = values.get("attention", {}).get("largest_deviation", {})
    peaks = [stage["peak_bytes"] for stage in stages.values() if stage["peak_bytes"] is not None]
    cells = [
        f"{versions['devices']} x {versions['device']}" if versions else "-",
        versions["packages"]["jax"] if versions else "-",
        ", ".join(f"{name} {_number(value)}" for name, value in deviations.items()) or "-",
        _cosine_of_concept(parts),
        *(_cold_and_warm(stages.get(name)) for name in STAGES),
        f"{max(peaks) / 1e9:.1f}" if peaks else "-",
        " / ".join(_share(stages.get(name)) for name in ("drawing", "tuning")),
        f"{step['batch']}: {step['warm_seconds']:.3g}" if step else "-",
        f"{ratio['drawing']:.2f} / {ratio['tuning']:.2f}" if ratio else "-",
        datetime.now(UTC).date().isoformat(),
    ]
    return f"| {' | '.join(cells)} |"


def _cosine_of_concept(parts: Sequence[Part]) -> str:
    comparisons = [comparison for part in parts for comparison in part.outcome.comparisons]
    return next((f"{c.deviation:.2g}" for c in comparisons if c.name == "concept cosine"), "-")


def _cold_and_warm(stage: Mapping[str, Any] | None) -> str:
    return f"{stage['cold_seconds']:.3g} / {stage['warm_seconds']:.3g}" if stage else "-"


def _share(stage: Mapping[str, Any] | None) -> str:
    return f"{stage['share_of_peak']:.0%}" if stage and stage["share_of_peak"] is not None else "-"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g}"
