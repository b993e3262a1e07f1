"""The report as one HTML file that needs nothing beside it: figures by what they are about, bars, pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from vqscale.evaluation.charts import bars
from vqscale.evaluation.markup import Picture, document, figure, section, text


@dataclass(frozen=True)
class Topic:
    """Figures that belong together."""

    title: str
    about: str
    figures: Mapping[str, str]
    """Key of the report → what it means. A key that ends in `_` stands for all keys that begin with it. `{key}` in a
    meaning is replaced by that figure of the report, so that sizes and references stand beside what depends on them."""


TOPICS = (
    Topic(
        "Reconstructions",
        "Held-out images through the tokenizer and back; each figure a mean over images.",
        {
            "held_out_images": "images that the figures are over",
            "psnr": "peak signal-to-noise ratio, dB",
            "ssim": "structural similarity, 1 for equal images",
            "mse": "mean squared error, pixels in [0, 1]",
            "l1": "mean absolute error, pixels in [0, 1]",
            "mse_over_variance": "error over the variance of the pixels: 1 is a plain grey image",
            "lpips": "difference as VGG16 sees it, 0 for equal images",
            "rfid": "Fréchet distance of {rfid_images} reconstructions to as many images of {rfid_reference}",
            "rfid_images": "images that it is over",
            "rfid_reference": "what they are compared with",
            "hour_accuracy_reconstructed": "clocks that still show their hour",
        },
    ),
    Topic(
        "Sharpness",
        "Blur takes contrast between neighbouring pixels, and fine detail. Reconstructions and samples have a share of "
        "what the first {sharpness_images} held-out images have: 1 is as sharp as they are, less is blurred, more is "
        "noisier.",
        {
            "sharpness_gradient_energy_images": "squared difference of neighbouring pixels, held-out images",
            "sharpness_gradient_energy_reconstructions": "reconstructions, as a share of it",
            "sharpness_gradient_energy_samples": "drawn images, as a share of it",
            "sharpness_high_frequencies_images": "power in the upper half of the frequencies, held-out images",
            "sharpness_high_frequencies_reconstructions": "reconstructions, as a share of it",
            "sharpness_high_frequencies_samples": "drawn images, as a share of it",
            "sharpness_images": "held-out images that these are over",
        },
    ),
    Topic(
        "Codebooks",
        "By level; usage and perplexity over the training images, entropy over the held-out ones.",
        {
            "usage_": "share of the codes that occur",
            "perplexity_": "as many codes as if all were used alike",
            "held_out_usage_": "share of the codes that occur in held-out images",
            "held_out_perplexity_": "as many codes as if those were used alike",
            "held_out_entropy_bits_": "entropy of a code, bits",
            "nearest_code_median_": "distance to the next code, in deviations of the codebook: median",
            "nearest_code_least_": "the least of them: 0 says that two codes are the same",
            "code_distance_median_": "distance of two codes, in deviations of the codebook: median",
            "codes_differ_from_fp32": "share of codes that bf16 chose otherwise",
        },
    ),
    Topic(
        "Gaussian latents",
        "By level, over the held-out images.",
        {
            "kl_": "divergence of the posterior from N(0, 1), nats an image",
            "units_active": "of {units} latent values those whose mean differs from image to image",
            "units": "latent values of an image",
            "active_": "share of the units whose mean differs from image to image",
            "posteriors_differ_from_fp32": "distance that bf16 moves means, in standard deviations",
        },
    ),
    Topic(
        "Likelihood",
        "Bits that suffice to write a held-out image down: its latents, then its pixels given them.",
        {
            "bits_per_dim": "of pixels and latents together",
            "bits_per_dim_error": "standard error over images",
            "bits_per_dim_is": "what that is: the likelihood itself, or a bound that it is not worse than",
            "bits_per_dim_best": "the least that was shown to suffice: the same, or less what many draws have gained",
            "bits_per_dim_best_error": "standard error over images",
            "bits_per_dim_best_is": "what that is",
            "bits_per_dim_pixels": "of the pixels, given their latents",
            "bits_per_dim_codes": "of the codes, under the prior",
            "bits_per_dim_uniform": "of both, with the uniform prior in its place",
            "bits_per_dim_codes_uniform": "of the codes, with the uniform prior",
            "bits_per_dim_latents": "of continuous latents: their divergence from the prior",
            "bits_per_dim_normal": "of both, with the prior N(0, 1) in its place",
            "bits_per_dim_latents_normal": "of the latents, with the prior N(0, 1)",
            "bits_per_sample": "bits of all latents of an image, under the prior",
            "pixel_likelihood": "distribution of a pixel around its reconstruction",
            "codes_likelihood": "whether the prior's likelihood is exact or a bound",
            "nats_per_code": "nats a code",
            "nats_per_code_": "the same by level; `_uniform` is that of a prior that knows nothing",
            "nats_per_value": "nats a value of continuous latents, of a density",
            "nats_per_value_": "the same by level",
        },
    ),
    Topic(
        "Estimates of the likelihood",
        "Bits per dimension of the first {estimate_images} held-out images, by {estimate_draws} draws of their latents "
        "each. The ELBO says too much, more draws at once say less; importance sampling is nearest to the truth. "
        "Effective draws are how many of equal weight the draws are worth: near 1, neither the estimate nor its error "
        "means much.",
        {
            "estimate_elbo": "evidence lower bound: one draw at a time",
            "estimate_iwae": "importance-weighted bound: {estimate_iwae_draws} draws at a time",
            "estimate_importance_sampling": "all {estimate_draws} draws from the posterior at once",
            "estimate_naive": "all {estimate_draws} draws from the prior at once, few of which explain an image",
            "estimate_iwae_gain": "what the importance-weighted bound saves against the ELBO",
            "estimate_elbo_": "the ELBO's standard error over images; of it what comes from the draws (draw_error)",
            "estimate_iwae_gain_": "standard error over images",
            "estimate_iwae_": "the bound's standard error; of it what comes from the draws; effective draws, median",
            "estimate_importance_sampling_": "the same of importance sampling",
            "estimate_naive_": "the same of naive Monte Carlo",
            "estimate_": "settings",
        },
    ),
    Topic(
        "Samples",
        "Images drawn from the prior, with the reference and its size beside each figure that needs one.",
        {
            "samples": "images",
            "sampling_images_per_s": "images a second that all processes together have drawn",
            "fid": "Fréchet distance of {fid_samples} samples to {fid_reference_images} images of {fid_reference}",
            "fid_samples": "samples that it is over",
            "fid_reference": "the reference",
            "fid_reference_images": "its images",
            "inception_score": "Inception Score of {fid_samples} samples",
            "inception_score_deviation": "its deviation over ten parts",
            "precision": "of {precision_images} samples those that lie where as many images of {fid_reference} do",
            "recall": "of {precision_images} images of {fid_reference} those that lie where as many samples do",
            "precision_images": "images of each set that both are over",
            "features_sha256": "which network made the features",
            "hour_accuracy": "clocks that show the hour they were drawn for",
            "samples_per_hour": "the fewest samples of an hour",
            "samples_unreadable": "samples that show no clock",
        },
    ),
    Topic(
        "Classification accuracy score",
        "A classifier learns the classes from one set alone; what it names right of {cas_held_out_images} real, "
        "held-out images (Ravuri & Vinyals 2019).",
        {
            "cas_samples": "learned from {cas_samples_images} samples",
            "cas_samples_top5": "the class is among the five likeliest",
            "cas_reconstructions": "learned from {cas_reconstructions_images} reconstructions of training images",
            "cas_reconstructions_top5": "the class is among the five likeliest",
            "cas_images": "learned from {cas_images_images} real training images: what can be had",
            "cas_images_top5": "the class is among the five likeliest",
            "cas_": "images",
        },
    ),
)

BITS = {
    "code_bits_uniform": "uniform prior: every code alike",
    "code_bits_unused": "of it: codes that are rare anywhere",
    "code_bits_placed": "of it: codes that are rare at their place",
    "code_bits_positions": "what is left: each place for itself",
    "code_bits_learned": "learned prior: what neighbours tell, too",
    "code_bits_mutual_information": "mutual information of images and codes",
    "code_bits_kl_uniform": "aggregated posterior: KL to the uniform prior",
    "code_bits_mutual_information_given_class": "mutual information where the class is known",
    "code_bits_kl_learned": "aggregated posterior of a class: KL to the learned prior",
    "latent_bits_rate": "latents: their divergence from the prior",
    "latent_bits_mutual_information": "mutual information of images and latents",
    "latent_bits_mutual_information_given_class": "mutual information where the class is known, as the prior knows it",
    "latent_bits_kl_prior": "aggregated posterior (of a class, where the prior knows it): KL to the prior",
    "latent_bits_kl_normal": "aggregated posterior: KL to N(0, 1)",
    "latent_bits_most_information": "the most information that so many images can show",
    "image_bits_reconstruction": "reconstruction: pixels given the latents",
}
"""The terms of the ELBO and where they go (`surgery`), drawn as bars."""

SINGLE = ("name", "run")
"""Keys that stand in the page's head."""


def page(report: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """The whole document.

    Args:
        report: as in `report.json`; keys that it lacks are left out.
        pictures: shown in their order, before the figures.
    """
    known = [_topic(topic, report) for topic in TOPICS]
    parts = [*map(figure, pictures), *known, _charts(report), _bits(report), _rest(report), _seconds(report)]
    body = "\n".join(part for part in parts if part)
    return document(f"{report.get('name', 'run')}: evaluation", str(report.get("run", "")), body)


def _topic(topic: Topic, report: Mapping[str, Any]) -> str:
    rows = [(name, report[name], _filled(meaning, report)) for name, meaning in _rows(topic, report)]
    return section(topic.title, _filled(topic.about, report), _table(rows)) if rows else ""


def _filled(meaning: str, report: Mapping[str, Any]) -> str:
    """A meaning with the figures that it names; what the report lacks is a dash."""
    return re.sub(r"{(\w+)}", lambda found: text(report.get(found[1], "–")), meaning)


def _rows(topic: Topic, report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, meaning) of the topic's figures that the report has, each once."""
    seen = set()
    for key, meaning in topic.figures.items():
        fitting = [name for name in report if name.startswith(key)] if key.endswith("_") else [key]
        for name in fitting:
            if name in report and name not in seen and _is_single(report[name]):
                seen.add(name)
                yield name, meaning


def _rest(report: Mapping[str, Any]) -> str:
    """Figures that no topic knows: nothing that was measured is left out."""
    shown = {name for topic in TOPICS for name, _ in _rows(topic, report)} | set(BITS) | set(SINGLE)
    rows = [(name, value, "") for name, value in report.items() if name not in shown and _is_single(value)]
    return section("More", "What else was measured.", _table(rows)) if rows else ""


def _is_single(value: Any) -> bool:
    return not isinstance(value, (dict, list))


def _charts(report: Mapping[str, Any]) -> str:
    """How evenly the codes of each level are used, and how far apart they lie."""
    use, apart = "code_shares_", "code_distances_"
    levels = [key.removeprefix(use) for key in report if key.startswith(use)]
    drawn = [
        bars(report[use + level], f"{level}: share of the assignments", "most frequent codes", "rarest codes")
        + bars(report[apart + level], f"{level}: distances of two codes", "0", "4 deviations or more")
        for level in levels
        if apart + level in report
    ]
    about = "Over the held-out images; distances in deviations of the codebook."
    return section("Use and distances of codes", about, "<br>".join(drawn)) if drawn else ""


def _bits(report: Mapping[str, Any]) -> str:
    there = {name: float(report[name]) for name in BITS if name in report}
    if not there:
        return ""
    # Pixels have no bar: their bits are so many more than those of latents that no other would be seen.
    latent = {name: value for name, value in there.items() if name != "image_bits_reconstruction"}
    most = max(latent.values(), default=0.0)
    rows = "".join(
        f'<tr><td>{escape(BITS[name])}</td><td class="figure">{value:,.1f}</td>'
        f'<td><span class="bar" style="width:{_rem(latent.get(name, 0.0), most)}"></span></td></tr>'
        for name, value in there.items()
    )
    about = "Bits an image (ELBO surgery)."
    if "latent_images" in report:
        about += f" Of the latents over {report['latent_images']} images: information beyond log2 of them counts as KL."
    return section("Where the bits go", about, f"<table>{rows}</table>")


def _rem(value: float, most: float) -> str:
    return f"{value / most * 20 if 0 < value <= most else 0:.2f}rem"


def _seconds(report: Mapping[str, Any]) -> str:
    times = report.get("seconds")
    if not isinstance(times, Mapping):
        return ""
    return section("Time", "Seconds by stage.", _table([(name, value, "") for name, value in times.items()]))


def _table(rows: Sequence[tuple[str, Any, str]]) -> str:
    cells = (
        f'<tr><td><code>{escape(name)}</code></td><td class="figure">{escape(text(value))}</td>'
        f'<td class="meaning">{escape(meaning)}</td></tr>'
        for name, value, meaning in rows
    )
    return f"<table>{''.join(cells)}</table>"
