"""Writes docs/recipes.md from the recipe's types, by `settings_page.py`.

`make docs` runs it; a test compares the file with the types.
"""

from __future__ import annotations

from pathlib import Path

from settings_page import settings_page

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
    "prior.networks.N: dequantized": "DequantizedNetwork",
    "prior.networks.N: normal": "NormalNetwork",
    "prior.networks.N: realnvp": "RealNVPNetwork",
    "prior.networks.N: maf": "MAFNetwork",
    "prior.networks.N: iaf": "IAFNetwork",
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
    return settings_page(Recipe, HEAD, "The recipe", SECTIONS)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
