"""Stage `sample`: images from the prior, in the form that `sample.output` names, and a labelled sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.sample_folder import conclude, drawn_set, fill
from pipelines.stage import Stage, run_stage
from vqscale.data.drawn import DrawnSet
from vqscale.loading import class_names, load_prior, load_tokenizer
from vqscale.sampling import draw_images, labels_to_draw
from vqscale.training.checkpoints.fitting import require_prior_of


def main(stage: Stage) -> dict[str, Any]:
    """Draw the images that the recipe asks for, each rank its share; parts that are there are kept.

    `images_per_s` is the speed of all ranks together, writing included; of an array, of all tasks at the same time.
    """
    recipe, ranks, layout = stage.recipe, stage.ranks, stage.layout
    tokenizer, prior = load_tokenizer(layout.root, ranks.device), load_prior(layout.root, ranks.device)
    require_prior_of(tokenizer.fingerprint, layout.checkpoints(recipe, "prior"))
    names = class_names(layout, recipe)
    labels = labels_to_draw(recipe.sample, names)
    drawn = drawn_set(layout.samples, recipe.sample, names, labels, tokenizer, prior)
    mine, rates = stage.share(len(drawn.parts)), [0.0]
    events = stage.events("images/s", sum(len(drawn.parts[part]) for part in mine))

    def draw(numbers: Sequence[int]) -> NDArray[np.uint8]:
        labels = [drawn.labels[number] for number in numbers]
        return draw_images(prior, tokenizer, recipe.sample, labels, numbers)

    def report(done: int, rate: float | None) -> None:
        rates.append(rate or 0.0)
        if events:
            events.log(done, rate=rate)

    fill(drawn, ranks, mine, recipe.sample.batch, draw, report)
    if events:
        events.close()
    return {"drawn_from": drawn.drawn_from, "images_per_s": sum(ranks.gather(rates[-1]))}


def finish(stage: Stage, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Make the whole of the parts, and draw its sheet."""
    recipe, layout = stage.recipe, stage.layout
    names = class_names(layout, recipe)
    labels, size = labels_to_draw(recipe.sample, names), recipe.data.image_size
    drawn = DrawnSet(layout.samples, recipe.sample.output, size, names, labels, parts[0]["drawn_from"])
    conclude(drawn)
    rate = sum(part["images_per_s"] for part in parts)
    # None was drawn where all had been there before, so that nothing is known of their speed.
    return {"samples": len(drawn.labels), **({"images_per_s": round(rate, 3)} if rate else {})}


if __name__ == "__main__":
    run_stage("sample", main, finish)
