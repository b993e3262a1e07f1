"""The model card of an exported model, written from the run's own record; what is not known is not in it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from vqscale.config.exported import Exported
from vqscale.config.recipe import Recipe

_HELD_OUT = "{held_out_images} held-out images"
_FIGURES = {
    "psnr": ("PSNR of reconstructions, dB", _HELD_OUT),
    "ssim": ("SSIM of reconstructions", _HELD_OUT),
    "mse": ("mean squared error, pixels in [0, 1]", _HELD_OUT),
    "l1": ("mean absolute error, pixels in [0, 1]", _HELD_OUT),
    "lpips": ("LPIPS of reconstructions", _HELD_OUT),
    "rfid": ("rFID", "{rfid_images} images of {rfid_reference}"),
    "nats_per_code": ("nats a code", _HELD_OUT),
    "nats_per_value": ("nats a latent value", _HELD_OUT),
    "bits_per_dim": ("bits per dimension (a bound)", _HELD_OUT),
    "fid": ("FID of samples", "{fid_samples} samples, {fid_reference_images} images of {fid_reference}"),
    "inception_score": ("Inception Score of samples", "{fid_samples} samples"),
    "precision": ("precision of samples", "{precision_images} samples and as many images of {fid_reference}"),
    "recall": ("recall of samples", "{precision_images} samples and as many images of {fid_reference}"),
    "cas_samples": (
        "classification accuracy score",
        "{cas_samples_images} samples, {cas_held_out_images} held-out images",
    ),
    "hour_accuracy": ("samples that show the hour they were drawn for", "{samples} samples"),
}
"""Figures of the report, what they are, and what they are over."""
_PLACE = "PLACE"


def card(
    exported: Exported, recipe: Recipe, markers: Mapping[str, Mapping[str, Any]], report: Mapping[str, Any]
) -> str:
    """Markdown, with the header that model hubs read.

    Args:
        exported: what is exported.
        recipe: of the run.
        markers: stage → what it left when it was done.
        report: the run's evaluation; empty without one.
    """
    sections = (_head(exported), _use(exported), _data(recipe, markers), _training(exported, recipe, markers))
    parts = [*sections, _figures(exported, report), _limits(exported, report), _origin(exported)]
    return "\n\n".join(parts) + "\n"


def _head(exported: Exported) -> str:
    tokenizer, levels = exported.tokenizer, ", ".join(map(str, exported.levels))
    kinds = [network.kind for network in exported.prior.networks] if exported.prior else []
    prior = f" With a prior over the latents ({', '.join(kinds)})." if kinds else " Without a prior."
    tags = "".join(f"- {tag}\n" for tag in (*tokenizer.tags, "image-tokenizer"))
    return (
        f"---\nlibrary_name: vqscale\ntags:\n{tags}---\n\n"
        f"# {exported.name}\n\n{tokenizer.title} for RGB images of {exported.image_size} x {exported.image_size} "
        f"pixels. Levels, from fine to coarse: {levels}.{prior}"
    )


def _use(exported: Exported) -> str:
    name = "posteriors" if exported.levels[0].continuous else "codes"
    lines = [
        "from vqscale import load_tokenizer",
        f'tokenizer = load_tokenizer("{_PLACE}")',
        f"{name} = tokenizer.encode(images)  # uint8 [n, {exported.image_size}, {exported.image_size}, 3]",
        f"images = tokenizer.decode({'tokenizer.centres(posteriors)' if name == 'posteriors' else name})",
    ]
    return "## Use\n\n```py\n" + "\n".join(lines) + f"\n```\n\n`{_PLACE}` is this folder or its URL."


def _data(recipe: Recipe, markers: Mapping[str, Mapping[str, Any]]) -> str:
    data = recipe.data
    if data.clocks:
        what = f"Generated clock faces: {data.clocks.train:,} for training, {data.clocks.validation:,} held out."
    else:
        counts = markers.get("extract", {})
        numbers = [(split, counts.get(f"{split}_samples")) for split in ("train", "validation")]
        what = "; ".join(f"{split}: {count:,} images" for split, count in numbers if count is not None)
        what = f"{what or 'Shards of images'}."
    bad = sum(int(marker.get("bad_samples", 0)) for marker in markers.values())
    return f"## Data\n\n{what} Unreadable samples that training replaced: {bad}."


def _training(exported: Exported, recipe: Recipe, markers: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for stage, settings in (("tokenizer", exported.tokenizer), ("prior", exported.prior)):
        marker = markers.get(stage, {})
        if settings is None or not marker:
            continue
        training = settings.training
        rows.append(
            f"| {stage} | {marker.get('parameters', 0):,} | {marker.get('steps', training.steps):,} | "
            f"{training.global_batch} | {training.learning_rate:g} | {training.precision} | {marker['seconds']:,.0f} |"
        )
    head = ["| stage | weights | steps | global batch | learning rate | precision | seconds |", "|---|" + 6 * "---|"]
    return "## Training\n\n" + "\n".join([*head, *rows]) + f"\n\nSeed {recipe.seed}. All settings: `config.json`."


def _figures(exported: Exported, report: Mapping[str, Any]) -> str:
    names = [level.name for level in exported.levels]
    levels = {f"usage_{name}": (f"codes of level {name} in use", "training images") for name in names}
    levels |= {f"active_{name}": (f"active units of level {name}", _HELD_OUT) for name in names}
    known = {name: texts for name, texts in {**_FIGURES, **levels}.items() if name in report}
    if not known:
        return "## Figures\n\nThe run was not evaluated."
    rows = [f"| {text} | {_text(report[name])} | {_filled(over, report)} |" for name, (text, over) in known.items()]
    return "## Figures\n\n" + "\n".join(["| figure | | over |", "|---|---|---|", *rows])


def _filled(over: str, report: Mapping[str, Any]) -> str:
    """With the report's figures in their places; nothing where it lacks one of them."""
    try:
        return over.format_map(report)
    except KeyError:
        return ""


def _limits(exported: Exported, report: Mapping[str, Any]) -> str:
    limits = [f"Images of another size than {exported.image_size} pixels have to be cropped and resized first."]
    if exported.prior and not exported.classes:
        limits.append("The prior knows no classes.")
    missing = [name for name in ("rfid", "fid") if name not in report and (name != "fid" or exported.prior)]
    if missing:
        limits.append(f"Not measured: {', '.join(missing)}.")
    limits.append("What the training images lack, the model has not learned; nothing was filtered from its output.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _origin(exported: Exported) -> str:
    made = dict(exported.made_by)
    created = made.pop("created", None)
    rows = [f"- {name.replace('_', ' ')}: `{value}`" for name, value in made.items() if value not in (None, "")]
    if created:
        rows.append(f"- exported: {time.strftime('%Y-%m-%d', time.gmtime(created))}")
    rows.append(f"- tokenizer's identity, as code shards carry it: `{exported.fingerprint}`")
    weights = [f"- `{name}`: {file.bytes:,} bytes, sha256 `{file.sha256}`" for name, file in exported.files.items()]
    return "## Origin\n\n" + "\n".join([*rows, *weights])


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
