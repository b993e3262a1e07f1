"""All that the stage `evaluate` and the command of that name measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.classifying import measure_classifiers, shards_of
from pipelines.held_out import held_out, pixels_given_latents
from pipelines.sources import image_source
from pipelines.stage import Stage
from vqscale.checkpoint.folder import steps
from vqscale.data.drawn import RECORD, DrawnSet, open_drawn
from vqscale.data.images import encode_png
from vqscale.data.sheet import code_colours, colour_codes, labelled_sheet
from vqscale.evaluation.bits import LevelCodes
from vqscale.evaluation.estimates import LikelihoodEstimates, best_figures
from vqscale.evaluation.features import FeatureNetwork, load_features
from vqscale.evaluation.hours import HourCounts
from vqscale.evaluation.image_nats import Likelihoods
from vqscale.evaluation.latents import PosteriorStatistics, PosteriorSurgery
from vqscale.evaluation.measures import CodeStatistics, FeatureDistance, Measure, Shown, learned_figures
from vqscale.evaluation.reconstructions import Reconstructions
from vqscale.evaluation.samples import SampleQuality
from vqscale.evaluation.sharpness import FIRST, MeanSharpness, Sharpness, shares
from vqscale.files import write_bytes
from vqscale.loading import TrainedTokenizer, load_prior, load_tokenizer
from vqscale.models.lpips import load_lpips
from vqscale.models.prior import Prior
from vqscale.training.checkpoints.fitting import require_prior_of

SHEET_IMAGES = 12
RECONSTRUCTIONS = "reconstructions.png"

Seen = Callable[[int], None]
"""Told how many images this rank has measured, or a classifier has learned from, since the last time."""


def measure(stage: Stage, seen: Seen = lambda count: None) -> dict[str, Any]:
    """Measure held-out images, and the images that were drawn; collective.

    Raises:
        UserError: no trained tokenizer, a prior of another tokenizer's codes, weights that cannot be read.
    """
    layout, recipe, device = stage.layout, stage.recipe, stage.ranks.device
    tokenizer, priors = load_tokenizer(layout.root, device), layout.checkpoints(recipe, "prior")
    require_prior_of(tokenizer.fingerprint, priors)
    prior = load_prior(layout.root, device) if steps(priors) else None
    network = load_features(recipe.evaluate.features, device) if recipe.evaluate.features else None
    figures = measure_held_out(stage, tokenizer, prior, network, seen)
    figures |= measure_samples(stage, network, figures)
    wanted = recipe.evaluate.classifier
    return figures | (measure_classifiers(stage, wanted, tokenizer, seen) if wanted else {})


def measure_held_out(
    stage: Stage,
    tokenizer: TrainedTokenizer,
    prior: Prior | None,
    network: FeatureNetwork | None = None,
    seen: Seen = lambda count: None,
) -> dict[str, Any]:
    """All measures of the held-out images, and a sheet of inputs above their reconstructions."""
    measures = _measures(stage, tokenizer, prior, network)
    for number, shown in enumerate(held_out(stage, tokenizer)):
        if number == 0 and stage.ranks.first:
            _write_sheet(stage.layout.samples, shown, tokenizer)
        for measure in measures:
            measure.add(shown)
        seen(len(shown.images))
    figures = {name: value for measure in measures for name, value in measure.figures(stage.ranks).items()}
    return figures | learned_figures(figures, stage.recipe.dimensions) | best_figures(figures)


def _measures(
    stage: Stage, tokenizer: TrainedTokenizer, prior: Prior | None, network: FeatureNetwork | None
) -> list[Measure]:
    """What the recipe wants measured; every one of them is shown all held-out images."""
    recipe, size, device = stage.recipe, stage.recipe.data.image_size, stage.ranks.device
    lpips = load_lpips(recipe.evaluate.lpips_paths, "evaluate.lpips").to(device) if recipe.evaluate.lpips else None
    latents = {level.name: LevelCodes(level.values, level.codes) for level in reversed(recipe.levels)}
    likelihoods = Likelihoods(pixels_given_latents(stage, tokenizer), latents, recipe.dimensions, prior, device)
    measures: list[Measure] = [
        Reconstructions(size, clocks=bool(recipe.data.clocks), lpips=lpips),
        likelihoods,
        *_of_latents(stage, tokenizer, prior, likelihoods),
        Sharpness(),
    ]
    return [*measures, FeatureDistance(network, size)] if network else measures


def _of_latents(
    stage: Stage, tokenizer: TrainedTokenizer, prior: Prior | None, likelihoods: Likelihoods
) -> list[Measure]:
    """What is said of the latents: how codes are used; or what posteriors carry, and estimates by draws of them."""
    recipe, levels = stage.recipe, stage.recipe.levels
    if not tokenizer.network.continuous:
        books = zip(levels, tokenizer.network.vectors(), strict=True)
        return [CodeStatistics({level.name: (book, level.grid) for level, book in books})]
    names, wanted = [level.name for level in reversed(levels)], recipe.evaluate.latents
    found: list[Measure] = [PosteriorStatistics(levels), PosteriorSurgery(names, wanted.aggregated, likelihoods)]
    if prior and tokenizer.network.likelihood:
        given = (wanted, tokenizer.nats, names, prior, recipe.dimensions, recipe.seed)
        found.append(LikelihoodEstimates(*given, stage.ranks.device, recipe.evaluate.batch))
    return found


def measure_samples(stage: Stage, network: FeatureNetwork | None, held_out: Mapping[str, Any]) -> dict[str, Any]:
    """How sharp drawn images are; on clocks the hours that they show; with a feature network how good and how varied.

    Args:
        stage: of the run.
        network: makes features; None leaves out what is made of them.
        held_out: figures of the held-out images, which sharpness is a share of.
    """
    if not (stage.layout.samples / RECORD).exists() and not stage.recipe.data.clocks:
        return {}
    drawn = open_drawn(stage.layout.samples)
    figures: dict[str, Any] = {"samples": len(drawn.labels)}
    figures |= shares("samples", measure_sharpness(stage, drawn), held_out)
    if stage.recipe.data.clocks:
        figures |= measure_hours(stage, drawn)
    return figures | (measure_quality(stage, drawn, network) if network else {})


def measure_sharpness(stage: Stage, drawn: DrawnSet) -> dict[str, float]:
    """Means over the first drawn images, as many as of the held-out ones at most."""
    sharpness = MeanSharpness()
    for numbers in _shares(stage, min(len(drawn.labels), FIRST)):
        sharpness.add(drawn.read(numbers))
    return sharpness.figures(stage.ranks)


def measure_hours(stage: Stage, drawn: DrawnSet) -> dict[str, Any]:
    """Read the hour of every drawn image and compare it with the class that was asked for."""
    counts = HourCounts()
    for numbers in _shares(stage, len(drawn.labels)):
        counts.add(drawn.read(numbers), np.array([drawn.labels[number] for number in numbers]))
    total = HourCounts().merge(stage.ranks.gather(counts))
    return {
        "hour_accuracy": total.accuracy,
        "hour_accuracy_by_hour": total.by_hour(),
        "samples_per_hour": int(total.images.min()),
        "samples_unreadable": int(total.unreadable.sum()),
    }


def measure_quality(stage: Stage, drawn: DrawnSet, network: FeatureNetwork) -> dict[str, Any]:
    """FID, Inception Score, precision and recall against the reference that the recipe names."""
    wanted, size = stage.recipe.evaluate, stage.recipe.data.image_size
    quality = SampleQuality(network, size, wanted.compared_images)
    for numbers in _shares(stage, len(drawn.labels)):
        quality.add(drawn.read(numbers), np.asarray(numbers), reference=False)
    source = image_source(stage, wanted.reference)
    for batch in stage.read_once(source, shards_of(source.shards.counts, wanted.reference_images)):
        first = batch.index < wanted.reference_images
        if first.any():
            quality.add(batch.fields["image"][first], batch.index[first], reference=True)
    return quality.figures(stage.ranks, wanted.reference)


def _shares(stage: Stage, count: int) -> Iterator[range]:
    """This rank's share of so many drawn images, in batches of numbers."""
    mine, batch = range(stage.ranks.rank, count, stage.ranks.world), stage.recipe.evaluate.batch
    return (mine[start : start + batch] for start in range(0, len(mine), batch))


def _write_sheet(folder: Path, shown: Shown, tokenizer: TrainedTokenizer) -> None:
    """Some images, their reconstructions, what each level carries alone, and the code grids in colour."""
    names, size = tokenizer.levels[::-1], tokenizer.image_size
    encoded = {name: own[:SHEET_IMAGES] for name, own in shown.encoded.items()}
    rows = {"input": shown.images[:SHEET_IMAGES], "reconstruction": shown.pixels[:SHEET_IMAGES]}
    if len(names) > 1:
        latents = tokenizer.centres(encoded)
        rows |= {f"{name} alone": tokenizer.decode_alone(latents, name) for name in names}
    books = dict(zip(tokenizer.levels, tokenizer.network.vectors(), strict=False))  # none of continuous latents
    for name in names[len(names) - len(books) :]:
        rows[f"{name} codes"] = colour_codes(encoded[name], code_colours(books[name].cpu().numpy()), size)
    write_bytes(folder / RECONSTRUCTIONS, encode_png(labelled_sheet(rows)))
