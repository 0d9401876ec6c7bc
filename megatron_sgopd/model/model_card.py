"""README.md of an exported model: what the hub reads, results and recipe; and where it is from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_sgopd.config.hub_names import is_hub_name
from megatron_sgopd.model.hf_writer import ORIGIN_FILE, README
from megatron_sgopd.versions import installed

LICENCE_KEYS = ("license", "license_name", "license_link")
RESULTS = {  # of summary.json: fractions
    "avg_at_k": "avg@{n}",
    "pass_at_k": "pass@{k}",
    "greedy": "greedy",
    "initial_avg_at_k": "avg@{n} before training",
}


@dataclass(frozen=True)
class Origin:
    """Describes where a model comes from; kept in sgopd.json beside it."""

    name: str = ""  # of its directory, or the hub name
    base_model: str | None = None  # a hub name
    licence: Mapping[str, str] = field(default_factory=dict)  # the model card's keys for it


def origin_of(name: str, directory: Path) -> Origin:
    """Reads the origin of a model that was asked for by this name and lies in this directory."""
    if (directory / ORIGIN_FILE).is_file():  # an export of ours keeps its origin
        kept = json.loads((directory / ORIGIN_FILE).read_text(encoding="utf-8"))
        return Origin(kept.get("name", ""), kept.get("base_model"), kept.get("licence", {}))
    on_hub = is_hub_name(name)
    front = front_matter(directory / README)
    licence = {key: str(front[key]) for key in LICENCE_KEYS if key in front}
    return Origin(name if on_hub else Path(name).name, name if on_hub else None, licence)


def front_matter(readme: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; empty where there is none that can be read."""
    if not readme.is_file():
        return {}
    text = readme.read_text(encoding="utf-8", errors="replace")
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def origin_json(origin: Origin) -> str:
    """The text of sgopd.json."""
    version = installed("megatron_sgopd") or "from a folder, not installed"
    written = {"written_by": f"megatron_sgopd {version}"}
    return json.dumps(written | asdict(origin), indent=2) + "\n"


def model_card(
    origin: Origin,
    *,
    recipe: str | None = None,
    step: int | None = None,
    results: Mapping[str, Any] | None = None,
) -> str:
    """README.md. `recipe`: resolved, as YAML; `results`: the run's summary, as far as there is."""
    parsed = yaml.safe_load(recipe) if recipe else {}
    method = parsed.get("distill", {}).get("method")
    front = dict(origin.licence)
    if origin.base_model:
        front["base_model"] = origin.base_model
    tags = ["megatron_sgopd", *(["on-policy-distillation", method] if method else [])]
    head = {**front, "library_name": "transformers", "pipeline_tag": "text-generation"}
    text = f"---\n{yaml.safe_dump({**head, 'tags': tags}, sort_keys=False)}---\n"
    text += f"# {parsed.get('name') or origin.name or 'Model'}\n\n"
    text += _what_it_is(origin, method, step)
    if rows := _rows(results or {}, step):
        text += "\n## Results\n| | |\n|---|---|\n" + "".join(rows)
    if recipe:
        text += f"\n## Recipe\n```yaml\n{recipe.rstrip()}\n```\n"
    return text


def _what_it_is(origin: Origin, method: str | None, step: int | None) -> str:
    base = f"`{origin.name}`" if origin.name else "a model"
    if method is None:
        return f"Weights of {base}, converted by megatron_sgopd.\n"
    steps = "1 step" if step == 1 else f"{step} steps"
    return f"Weights of {base} after {steps} of `{method}`, trained by megatron_sgopd.\n"


def _rows(results: Mapping[str, Any], step: int | None) -> list[str]:
    n, k = results.get("num_samples"), results.get("k")
    rows = [
        f"| {label.format(n=n, k=k)} | {100 * results[key]:.1f} % |\n"
        for key, label in RESULTS.items()
        if isinstance(results.get(key), float | int)
    ]
    if interval := results.get("ci95"):
        low, high = (100 * x for x in interval)
        rows.insert(1, f"| 95 % interval of avg@{n} | {low:.1f} – {high:.1f} % |\n")
    sets = results.get("benchmarks", {})
    if len(sets) > 1:  # the lines above are the mean of these
        rows += [
            f"| avg@{n} on {name} | {100 * of['avg_at_k']:.1f} % |\n" for name, of in sets.items()
        ]
    if (best := results.get("best")) and best["step"] == step:
        label = f"avg@{best['k']} on the development set at step {best['step']}"
        rows.append(f"| {label} | {100 * best['avg_at_k']:.1f} % |\n")
    return rows
