"""Writes docs/recipes.md from the recipe's types: every setting with its type, default and description.

`make docs` runs it; a test compares the file with the types.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from vqscale.config.recipe import Recipe

PAGE = Path(__file__).with_name("recipes.md")

HEAD = """\
# Recipes

<!-- Written by docs/make_recipes.py from vqscale/config/recipe.py. Change the text there, then run `make docs`. -->

A recipe is one YAML file for a whole experiment. These are all its settings, with type, default and meaning. A setting
without a default has to be in the file. An unknown key is refused, with the nearest valid key in the message.

Any setting can be changed on the command line, by its dotted name. Items of a list go by their number, from 0. Values
are read as YAML:

```console
$ vqscale plan quickstart seed=7 tokenizer.training.steps=2000 tokenizer.levels.0.codes=256
$ vqscale plan quickstart 'prior.training.betas=[0.9, 0.99]' prior.networks.0.layers=6
```

`vqscale schema` prints the same settings as JSON Schema, which editors use to complete and check recipes:

```console
$ vqscale schema > recipe.schema.json
```

The recipes that come with vqscale are in [pipelines/recipes](../pipelines/recipes). `vqscale submit NAME` finds them by
name. Several settings have to fit each other; [Your own images](your-images.md#which-numbers-must-divide) lists them.
"""

SECTIONS = {
    "": "Recipe",
    "data": "Data",
    "data.clocks": "Clocks",
    "data.remote": "Remote",
    "tokenizer: vqvae2": "VQVAE2",
    "tokenizer.levels.N": "Level",
    "tokenizer.quantizer": "Quantizer",
    "tokenizer.losses": "Losses",
    "tokenizer.losses.perceptual": "Perceptual",
    "tokenizer.losses.adversarial": "Adversarial",
    "tokenizer.training": "Training",
    "tokenizer: vae": "GaussianVAE",
    "tokenizer.levels.N: vae": "LatentLevel",
    "tokenizer.likelihood: gaussian": "GaussianLikelihood",
    "tokenizer.likelihood: mixture": "MixtureLikelihood",
    "tokenizer.likelihood: autoregressive": "AutoregressiveLikelihood",
    "tokenizer: pixels": "Pixels",
    "extract": "Extract",
    "prior": "Prior",
    "prior.networks.N: transformer": "TransformerNetwork",
    "prior.networks.N: pixelcnn": "PixelCNNNetwork",
    "prior.networks.N: recurrent": "RecurrentNetwork",
    "prior.networks.N: masked": "MaskedNetwork",
    "prior.networks.N: blockwise": "BlockwiseNetwork",
    "prior.networks.N: uniform": "UniformNetwork",
    "prior.networks.N: normal": "NormalNetwork",
    "prior.networks.N: realnvp": "RealNVPNetwork",
    "prior.networks.N: maf": "MAFNetwork",
    "prior.networks.N: aggregated": "AggregatedNetwork",
    "prior.training": "Training",
    "sample": "Sample",
    "evaluate": "Evaluate",
    "evaluate.classifier": "Classifier",
    "evaluate.latents": "ContinuousLatents",
    "resources": "Resources",
    "resources.stages": "Stages",
    "resources.stages.generate": "StageResources",
    "resources.stages.pack": "StageResources",
    "resources.stages.tokenizer": "StageResources",
    "resources.stages.extract": "ArrayResources",
    "resources.stages.prior": "StageResources",
    "resources.stages.sample": "ArrayResources",
    "resources.stages.evaluate": "StageResources",
}
"""Dotted name of each section → its type, in the order of the page."""


def page() -> str:
    """The whole page as Markdown."""
    schema = Recipe.model_json_schema()
    types = {"Recipe": schema, **schema["$defs"]}
    missing = set(types) - set(SECTIONS.values())
    if missing:
        raise SystemExit(f"give the section {', '.join(sorted(missing))} a place in SECTIONS of {Path(__file__).name}")
    parts = [HEAD]
    shown: dict[str, str] = {}
    for name, kind in SECTIONS.items():
        parts.append(f"## {f'`{name}`' if name else 'The recipe'}\n")
        parts.append(f"{types[kind]['description']}\n")
        if kind in shown:
            parts.append(f"The settings are those of [`{shown[kind]}`](#{_anchor(shown[kind])}).\n")
            continue
        shown[kind] = name
        parts.append(_table(types[kind], name))
    return "\n".join(parts)


def _table(section: dict[str, Any], name: str) -> str:
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    required = section.get("required", [])
    for key, field in section["properties"].items():
        default = "" if key in required else _default(field["default"])
        path = f"{name.partition(': ')[0]}.{key}".strip(".")
        cells = (f"`{key}`", _type(field, path), default, " ".join(field["description"].split()))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _type(field: dict[str, Any], name: str) -> str:
    if "anyOf" in field:
        return " or ".join(_type(option, name) for option in field["anyOf"])
    if "oneOf" in field:
        kinds = [section for section in SECTIONS if section.startswith(f"{name}: ")]
        return "section: " + " or ".join(f"[{kind.partition(': ')[2]}](#{_anchor(kind)})" for kind in kinds)
    if "$ref" in field:
        kind = field["$ref"].rpartition("/")[2]
        found = (section for section, its in SECTIONS.items() if section.partition(": ")[0] == name and its == kind)
        return f"[section](#{_anchor(next(found))})"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return _array(field, name)
    words = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "nothing"}
    return " ".join([words[field["type"]], *_limits(field)])


def _array(field: dict[str, Any], name: str) -> str:
    if "prefixItems" in field:
        return f"list of {len(field['prefixItems'])}: {_type(field['prefixItems'][0], name)}"
    item = _type(field["items"], f"{name}.N")
    if "minItems" not in field:
        return f"list: {item}"
    if "maxItems" not in field:
        return f"list of {field['minItems']} or more: {item}"
    return f"list of {field['minItems']} to {field['maxItems']}: {item}"


def _limits(field: dict[str, Any]) -> list[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {_number(field[key])}" for key, sign in signs.items() if key in field]
    return [", ".join(limits)] if limits else []


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if math.isfinite(value) else str(value)


def _default(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "as below"
    return f"`{json.dumps(value)}`"


def _anchor(name: str) -> str:
    """Where a heading `name` is on a rendered page."""
    return name.lower().replace(".", "").replace(":", "").replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
