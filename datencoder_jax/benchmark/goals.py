"""What the tuning-encoder is to reach on the embedded world, held against the numbers of a run.

With `I`, `P` and `IP` the mean identity, prompt score and product of a row, and `g = I - I(base)` its gain,

    equal   I and P of datencoder@12 are at least those of METHOD@300                                           (1)
    fast    at a twentieth of its seconds                                                                       (2)
    best    IP of datencoder@12 is above that of METHOD@12, and the 95 % interval of the difference above 0     (3)
    start   g of datencoder@0 is at least 0.8 g of datencoder@12                                                (4)
    new     g of datencoder@12 on kinds of things held out is at least 0.8 of that on the others                (5)

Only goals whose rows are there are told, (2) only where one run measured both rows, on one device. Differences are
paired over the subjects that both rows have. A goal has no verdict where these are fewer than `MIN_SUBJECTS`; nor, but
for (2), which learning rates do not change, where a row was tuned at rates that nobody chose. With (5) comes the same
share of methods that no encoder helps: what they fall short of 1 by is how much harder the held-out kinds are for the
base model, not what an encoder has not seen.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from datencoder_jax.benchmark.joining import JOINED
from datencoder_jax.benchmark.learning_rates import describe_effort, lacks_chosen_rates
from datencoder_jax.evaluation.scores import MIN_SUBJECTS, Interval, bootstrap

OURS, STEPS, MANY = "datencoder", 12, 300
SLOW = ("lora", "dreambooth")
"""Methods that goals (1) and (2) are told of."""
_SHARE, _FASTER = 0.8, 20.0


def goals(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The goals of the content of a `metrics.json`.

    Returns:
        Of each its `text`, whether it is `met` (None without a verdict), its `numbers`, the `reason` why there is no
        verdict ("" where there is one), and `effort`: what its rows' learning rates were chosen on, where not alike.
    """
    rows = {(row["label"], row.get("steps")): row for row in content["rows"]}
    ours = rows.get((OURS, STEPS))
    if ours is None:
        return []
    base = next((row for row in content["rows"] if row.get("method") == "base"), None)
    slow = [rows[name, MANY] for name in SLOW if (name, MANY) in rows]
    found = [goal for row in slow for goal in (_equal(ours, row), _fast(ours, row))]
    found += [_best(ours, row) for (_, steps), row in rows.items() if steps == STEPS and row["method"] != OURS]
    if base is not None and (OURS, 0) in rows:
        found.append(_start(ours, rows[OURS, 0], base))
    groups = content.get("groups", {})
    if base is not None and {"in domain", "held out"} <= groups.keys():
        plain = [rows[name, STEPS] for name in SLOW if (name, STEPS) in rows]
        found.append(_new(ours, plain, base, groups["in domain"], groups["held out"]))
    return [goal for goal in found if goal is not None]


def _equal(ours: Mapping, other: Mapping) -> dict[str, Any] | None:
    identity, prompt = (_difference(ours, other, score) for score in ("identity", "prompt"))
    if identity is None or prompt is None:
        return None
    return _goal(
        f"{OURS} at {STEPS} steps: identity and prompt score at least those of {other['label']} at {MANY} steps",
        identity.mean >= 0 and prompt.mean >= 0,
        f"identity {_signed(identity)}, prompt {_signed(prompt)}",
        _too_few(identity, prompt) or _default_rates(ours, other),
        describe_effort([ours, other]),
    )


def _fast(ours: Mapping, other: Mapping) -> dict[str, Any] | None:
    spent, slow = _seconds(ours), _seconds(other)
    same = all(ours.get(what) == other.get(what) for what in (JOINED, "devices"))
    if not spent or not slow or not same:
        return None
    return _goal(
        f"{OURS} at {STEPS} steps: a twentieth of the seconds of {other['label']} at {MANY} steps",
        slow / spent >= _FASTER,
        f"{spent:.2f} s against {slow:.1f} s (1/{slow / spent:.1f})",
        _too_few(_difference(ours, other, "identity")),
    )


def _best(ours: Mapping, other: Mapping) -> dict[str, Any] | None:
    product = _difference(ours, other, "product")
    if product is None:
        return None
    text = f"{OURS} at {STEPS} steps: identity x prompt above that of {other['label']} at {STEPS} steps"
    reason = _too_few(product) or _default_rates(ours, other)
    return _goal(text, product.low > 0, f"difference {_signed(product)}", reason, describe_effort([ours, other]))


def _start(ours: Mapping, start: Mapping, base: Mapping) -> dict[str, Any] | None:
    tuned, untuned = (_difference(row, base, "identity") for row in (ours, start))
    if tuned is None or untuned is None:
        return None
    return _goal(
        f"{OURS} without tuning keeps {_SHARE:.0%} of the identity it gains with {STEPS} steps",
        tuned.mean > 0 and _SHARE * tuned.mean <= untuned.mean,
        f"gains {_signed(untuned)} and {_signed(tuned)}: {_share(untuned, tuned)}",
        _too_few(tuned, untuned) or _default_rates(ours),
    )


def _new(
    ours: Mapping, plain: Sequence[Mapping], base: Mapping, known: Sequence[int], unseen: Sequence[int]
) -> dict[str, Any] | None:
    inside, outside = (_difference(ours, base, "identity", subjects) for subjects in (known, unseen))
    if inside is None or outside is None:
        return None
    numbers = f"gains {_signed(outside)} and {_signed(inside)}: {_share(outside, inside)}"
    for row in plain:
        own, new = (_difference(row, base, "identity", subjects) for subjects in (known, unseen))
        if own is not None and new is not None:
            numbers += f"; {row['label']}, without an encoder, {_share(new, own)}"
    return _goal(
        f"on kinds of things that no encoder saw, {OURS} keeps {_SHARE:.0%} of the identity it gains on others",
        inside.mean > 0 and _SHARE * inside.mean <= outside.mean,
        numbers,
        _too_few(inside, outside) or _default_rates(ours),
    )


def _difference(first: Mapping, second: Mapping, score: str, subjects: Sequence[int] | None = None) -> Interval | None:
    """Paired over subjects; None where no subject has both."""
    values = []
    for row in (first, second):
        each = np.array([np.nan if x is None else x for x in row["values"].get(score, [])], np.float64)
        values.append(each if subjects is None or not len(each) else each[list(subjects)])
    if len(values[0]) != len(values[1]):
        return None
    differences = values[0] - values[1]
    differences = differences[np.isfinite(differences)]
    return bootstrap(differences) if len(differences) else None


def _seconds(row: Mapping) -> float:
    """From the picture to the concept."""
    return row["seconds"].get("predict", 0.0) + row["seconds"].get("tune", 0.0)


def _share(part: Interval, whole: Interval) -> str:
    """What part of a gain another one is; nothing is a part of no gain."""
    return f"{part.mean / whole.mean:.1%}" if whole.mean > 0 else "nothing to keep"


def _signed(interval: Interval) -> str:
    ends = f" [{interval.low:+.3f}, {interval.high:+.3f}]" if interval.certain else ""
    return f"{interval.mean:+.3f}{ends}"


def _too_few(*differences: Interval | None) -> str:
    """Why there is no verdict for want of subjects; empty where there are enough."""
    if all(difference is not None and difference.certain for difference in differences):
        return ""
    return f"fewer than {MIN_SUBJECTS} subjects"


def _default_rates(*rows: Mapping) -> str:
    """Why there is no verdict for want of chosen learning rates; empty where all rows have some."""
    if not (names := [f"{row['label']}@{row['steps']}" for row in rows if lacks_chosen_rates(row.get("rate_choice"))]):
        return ""
    return f"learning rates of {' and '.join(names)} are the method's defaults, which nobody chose for this suite"


def _goal(text: str, met: bool, numbers: str, reason: str = "", effort: str = "") -> dict[str, Any]:
    return {"text": text, "met": None if reason else bool(met), "numbers": numbers, "reason": reason, "effort": effort}
