"""`vqscale sample`: images from a finished run, into any folder."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines import given
from pipelines.data_report import print_json, progress
from pipelines.draw_options import command_parser, levels_of, require_one_source, settings_of
from pipelines.processes import Alone, launch, ranks_of
from pipelines.sample_folder import SHEET, conclude, drawn_set, fill
from vqscale.config.layout import RunLayout
from vqscale.config.load import load_recipe
from vqscale.config.recipe import Recipe, Sample
from vqscale.data.drawn import DrawnSet
from vqscale.errors import EXIT_USER_ERROR, UserError
from vqscale.loading import TrainedTokenizer, class_names, load_prior, load_tokenizer
from vqscale.models.prior import Prior
from vqscale.sampling import chosen_classes, draw_images, labels_to_draw
from vqscale.training.checkpoints.fitting import require_prior_of
from vqscale.training.distributed import Ranks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `vqscale sample` and return its exit code; under torchrun, as one of its ranks."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = command_parser().parse(words)
        if options.processes > 1 and "RANK" not in os.environ:
            require_one_source(options)
            return launch("pipelines.draw", options.processes, words)
        with ranks_of(options.device) as ranks:
            return _draw(options, ranks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


@dataclass(frozen=True)
class Job:
    """What one command draws."""

    drawn: DrawnSet
    settings: Sample
    prior: Prior
    tokenizer: TrainedTokenizer
    known: given.Given | None

    def draw(self, numbers: Sequence[int]) -> NDArray[np.uint8]:
        """Images by number."""
        labels = [self.drawn.labels[number] for number in numbers]
        known = self.known.rows(numbers) if self.known else None
        return draw_images(self.prior, self.tokenizer, self.settings, labels, numbers, known)


def _draw(options: argparse.Namespace, ranks: Ranks | Alone) -> int:
    began = time.perf_counter()
    try:
        job, fault = _prepare(options, ranks.device), ""
    except UserError as error:
        fault = str(error)
    faults = [text for text in ranks.gather(fault) if text]
    if faults:
        if ranks.first:
            print(f"error: {faults[0]}", file=sys.stderr, flush=True)
        ranks.barrier()  # the first to end ends the others
        return EXIT_USER_ERROR
    drawn = job.drawn
    mine = range(ranks.rank, len(drawn.parts), ranks.world)
    total = sum(len(drawn.parts[part]) for part in mine)
    with progress("drawing", "images") if ranks.first else nullcontext(lambda done, total: None) as show:
        fill(
            *(drawn, ranks, mine, job.settings.batch, job.draw),
            lambda done, rate: show(done, total),
            replace=options.force,
        )
    if ranks.first:
        conclude(drawn, job.known.sheet if job.known else None)
        _say(drawn, time.perf_counter() - began, options.json)
    return 0


def _prepare(options: argparse.Namespace, device: torch.device) -> Job:
    require_one_source(options)
    layout = RunLayout(Path(options.run).expanduser().resolve())
    recipe = _recipe(layout, options)
    settings = settings_of(options, recipe.sample)
    tokenizer, prior = load_tokenizer(layout.root, device), load_prior(layout.root, device)
    require_prior_of(tokenizer.fingerprint, layout.checkpoints(recipe, "prior"))
    names, known = class_names(layout, recipe), _known(options, tokenizer, recipe)
    chosen = chosen_classes(settings, names)
    labels = known.labels_to_draw(settings.count, chosen) if known else labels_to_draw(settings, names)
    if max(labels) >= max(1, len(names)):
        mend = f"labels go from 0 to {len(names) - 1}, -1 for none" if names else "the prior knows no classes, use -1"
        raise UserError(f"label {max(labels)} is no class", where=options.from_codes, mend=mend)
    folder = Path(options.out or f"{layout.root.name}-samples").expanduser().resolve()
    drawn = drawn_set(folder, settings, names, labels, tokenizer, prior, known.identity if known else "")
    if not drawn.is_finished():
        drawn.require_own(replace=options.force)
    return Job(drawn, settings, prior, tokenizer, known)


def _recipe(layout: RunLayout, options: argparse.Namespace) -> Recipe:
    if not layout.recipe.is_file():
        raise UserError("is no run", where=options.run, mend="vqscale ls lists them; RUN is the first word")
    for text in options.overrides:
        if not text.startswith("sample."):
            raise UserError(f"unexpected argument '{text}'", where="vqscale sample", mend="settings begin with sample.")
    return load_recipe(layout.recipe, options.overrides)


def _known(options: argparse.Namespace, tokenizer: TrainedTokenizer, recipe: Recipe) -> given.Given | None:
    if not (options.from_codes or options.complete or options.details_of):
        return None
    grids, levels = given.grids_of(recipe), levels_of(options)
    given.require_levels(levels, grids)
    if options.from_codes:
        return given.from_file(Path(options.from_codes), levels, grids, tokenizer.fingerprint)
    if options.complete:
        images = given.read_images(Path(options.complete), tokenizer.image_size)
        return given.completed(tokenizer, images, options.keep)
    images = given.read_images(Path(options.details_of), tokenizer.image_size)
    return given.from_images(tokenizer, images, levels, grids)


def _say(drawn: DrawnSet, seconds: float, as_json: bool) -> None:
    facts = {"folder": str(drawn.folder), "images": len(drawn.labels), "output": drawn.output}
    if as_json:
        print_json({**facts, "sheet": str(drawn.folder / SHEET), "seconds": round(seconds, 2)})
    else:
        print(f"{len(drawn.labels):,} images in {drawn.folder}", f"sheet: {drawn.folder / SHEET}", sep="\n")


if __name__ == "__main__":
    sys.exit(main())
