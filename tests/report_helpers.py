"""A synthetic evaluation of realistic size, and a reader of the page that is made of it."""

import json
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from datencoder_jax import methods

SUBJECTS, SIDE, PROMPTS = 128, 32, 8
STEPS = (0, 4, 12, 50, 300)
METHODS = tuple(methods.METHODS)
SCORES = {
    "identity": {"label": "identity", "unit": "cosine", "better": "higher", "about": "mean cosine, judge <v3>"},
    "prompt": {
        "label": "prompt",
        "unit": "share",
        "better": "higher",
        "about": "scene, style & accessory read as asked",
    },
    "product": {"label": "identity x prompt", "unit": "", "better": "higher", "about": "their product"},
    "copying": {"label": "copying", "unit": "share", "better": "lower", "about": "the input's scene is read"},
}
SHOWN = {"side": SIDE, "subjects": [0, 5, 70], "prompts": [0, 2, 3, 7]}


def synthetic(folder):
    """Writes metrics.json and its sheets; returns what was written."""
    rng = np.random.default_rng(7)
    (folder / "pictures").mkdir(parents=True)
    skill = rng.normal(0, 0.12, SUBJECTS)
    rows = []
    for place, (label, kind) in enumerate([("true picture", "reference"), ("another of its class", "reference")]):
        rows.append(row(rng, label, kind, 0, (0.96, 0.02)[place] + 0.02 * skill, np.full(SUBJECTS, 0.99)))
    for place, label in enumerate(METHODS):
        for steps in STEPS:
            reach = 1 - np.exp(-(steps + (20 if label in ("datencoder", "e4t") else 0)) / (30 + 12 * place))
            identity = 0.05 + (0.62 - 0.02 * place) * reach + skill + rng.normal(0, 0.05, SUBJECTS)
            prompt = np.clip(0.99 - 0.25 * reach**2 + rng.normal(0, 0.08, SUBJECTS), 0, 1)
            rows.append(row(rng, label, "method", steps, identity, prompt))
            rows[-1]["seconds"] = {"predict": 0.02 * (label == "datencoder"), "tune": 0.011 * steps, "draw": 1.3}
    by_name = {(r["label"], r["steps"]): r for r in rows}
    partly, wholly = by_name["lora", 50], by_name["disendiff", 300]
    for subject in (3, 64):
        for values in partly["values"].values():
            values[subject] = None
        partly["failed"].append({"subject": subject, "seed": 1, "error": "the loss <is> not | finite"})
    wholly["values"] = {name: [None] * SUBJECTS for name in SCORES}
    wholly["by_prompt"] = {name: [None] * PROMPTS for name in SCORES}
    wholly["failed"] = [{"subject": s, "seed": 0, "error": "no attention to calibrate"} for s in range(SUBJECTS)]
    wholly |= {"seconds": {}, "bytes": None, "trained": None, "pictures": None}
    for number, one in enumerate(rows):
        if one is not wholly:
            one["pictures"] = f"pictures/{number}.png"
            sheet(rng, folder / one["pictures"], len(SHOWN["subjects"]), len(SHOWN["prompts"]))
    sheet(rng, folder / "pictures" / "inputs.png", 1, len(SHOWN["subjects"]))
    content = {
        "format": "datencoder-evaluation",
        "version": 1,
        "suite": "toyworld",
        "model": "toyworld",
        "fingerprint": "1f2e3d4c",
        "command": "datencoder evaluate --suite toyworld --methods 'a,b' --out out/<here>",
        "device": "cpu (2 cores)",
        "settings": {
            "prompts": [f"a photo of a S* {where}" for where in ("on the beach", *"bcdefg", "in a snowy forest")],
            "seeds": [0, 1],
            "num": 1,
            "sampler": "ddim",
        },
        "scores": SCORES,
        "axes": {"identity": "identity", "prompt": "prompt"},
        "groups": {"in domain": list(range(96)), "held out": list(range(96, SUBJECTS))},
        "subjects": [{"name": f"creature {1100000 + k}", "class": "creature"} for k in range(SUBJECTS)],
        "rows": rows,
        "tiles": SHOWN,
        "inputs": "pictures/inputs.png",
        "goals": [
            {
                "text": "identity at 12 steps at least that of lora at 300",
                "met": False,
                "numbers": "-0.101 [-0.12, -0.09]",
            },
            {"text": "at most 1/20 of the seconds", "met": True, "numbers": "0.15 s against 3.30 s"},
        ],
    }
    (folder / "metrics.json").write_text(json.dumps(content))
    return content


def row(rng, label, kind, steps, identity, prompt):
    copying = np.clip(rng.normal(0.05, 0.05, SUBJECTS), 0, 1)
    values = {"identity": identity, "prompt": prompt, "product": identity * prompt, "copying": copying}
    return {
        "kind": kind,
        "label": label,
        "method": label,
        "options": {},
        "steps": steps,
        "rates": [0.001, 0.01] if kind == "method" else None,
        "seconds": {},
        "bytes": 99_840 if kind == "method" else None,
        "trained": 24_960 if kind == "method" else None,
        "values": {name: [round(float(v), 6) for v in value] for name, value in values.items()},
        "by_prompt": {name: [float(value.mean())] * PROMPTS for name, value in values.items()},
        "failed": [],
        "pictures": None,
    }


def sheet(rng, path, rows, columns):
    small = rng.integers(0, 256, (rows * 4, columns * 4, 3), dtype=np.uint8)
    Image.fromarray(small.repeat(SIDE // 4, 0).repeat(SIDE // 4, 1)).save(path)


class Page(HTMLParser):
    """Reads a page: its tables as rows of cells' texts, addresses, identifiers, pictures, and tags left open."""

    VOID = ("meta", "br", "img", "wbr", "link", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.ids, self.pictures, self.names = [], [], [], {}, set()
        self.tables, self.cell, self.text = {}, None, ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        self.addresses += re.findall(r"url\(([^)]*)\)", " ".join(value or "" for value in given.values()))
        if tag == "img":
            self.pictures.setdefault(given["alt"], []).append(given["src"])
        if tag == "table":
            self.rows = self.tables.setdefault(given.get("id", len(self.tables)), [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.cell = {"class": given.get("class", ""), "text": []}
            self.rows[-1].append(self.cell)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.text += data
        if self.cell is not None:
            self.cell["text"].append(data.strip())

    def table(self, name):
        """Rows by label and steps: a list of texts, one for each cell after these."""
        rows = {}
        for row in self.tables[f"table-{name}"][1:]:
            label = "".join(row[0]["text"])
            steps = "".join(row[1]["text"])
            rows[label, int(steps) if steps else None] = row[2:]
        return rows


def texts(cell):
    return [text.replace("−", "-") for text in cell["text"] if text]
