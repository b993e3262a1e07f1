"""Stage `sample`: images from the prior, in the form that `sample.output` names, and a labelled sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.drawing import conclude, fill
from pipelines.stage import Stage, run_stage
from vqscale.data.drawn import DrawnSet
from vqscale.export import class_names, load_prior, load_tokenizer
from vqscale.sampling import draw_images, labels_to_draw
from vqscale.training.checkpoints.fitting import require_prior_of
from vqscale.training.checkpoints.reader import content_hash


def main(stage: Stage) -> dict[str, Any]:
    """Draw the images that the recipe asks for, each rank its share; parts that are there are kept."""
    recipe, ranks, layout = stage.recipe, stage.ranks, stage.layout
    tokenizer, prior = load_tokenizer(layout.root, ranks.device), load_prior(layout.root, ranks.device)
    require_prior_of(tokenizer.fingerprint, layout.checkpoints(recipe, "prior"))
    follows_from = {
        "tokenizer": tokenizer.fingerprint,
        "prior": content_hash(prior.state_dict()),
        "settings": recipe.sample.model_dump(mode="json", exclude={"batch", "output", "count", "per_class", "classes"}),
    }
    drawn = drawn_set(stage, follows_from)
    mine = stage.share(len(drawn.parts))
    events = stage.events("images/s", sum(len(drawn.parts[part]) for part in mine))

    def draw(numbers: Sequence[int]) -> NDArray[np.uint8]:
        labels = [drawn.labels[number] for number in numbers]
        return draw_images(prior, tokenizer, recipe.sample, labels, numbers)

    def report(done: int, rate: float | None) -> None:
        if events:
            events.log(done, rate=rate)

    fill(drawn, ranks, mine, recipe.sample.batch, draw, report)
    if events:
        events.close()
    return {"drawn_from": follows_from}


def finish(stage: Stage, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Make the whole of the parts, and draw its sheet."""
    drawn = drawn_set(stage, parts[0]["drawn_from"])
    conclude(drawn)
    return {"samples": len(drawn.labels)}


def drawn_set(stage: Stage, drawn_from: Mapping[str, Any]) -> DrawnSet:
    """The images that the recipe asks for, and what they follow from."""
    recipe, layout = stage.recipe, stage.layout
    names = class_names(layout, recipe)
    labels = labels_to_draw(recipe.sample, names)
    return DrawnSet(layout.samples, recipe.sample.output, recipe.data.image_size, names, labels, drawn_from)


if __name__ == "__main__":
    run_stage("sample", main, finish)
