"""The report's figures against independent implementations and values that can be worked out by hand."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn

from tests.ranks import run_ranks
from vqscale.errors import UserError
from vqscale.evaluation.codebook import entropy_bits, report_codebook
from vqscale.evaluation.distributions import FrechetDistance, InceptionScore, precision_recall
from vqscale.evaluation.features import load_features
from vqscale.evaluation.measures import CodeStatistics, FeatureDistance, Shown, learned_figures
from vqscale.evaluation.metrics import l1, mse, psnr, ssim
from vqscale.evaluation.surgery import PositionCounts, dissect
from vqscale.training.distributed import process_group

CPU = torch.device("cpu")


def pictures(count: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Smooth pictures uint8 [count, size, size, 3] and noisy copies."""
    random = np.random.default_rng(seed)
    waves = np.sin(np.linspace(0, 9, size))[:, None] * np.cos(np.linspace(0, 7, size))[None, :]
    base = 128 + 90 * waves[None, :, :, None] * random.uniform(0.3, 1, (count, 1, 1, 3))
    noisy = base + random.normal(0, 12, base.shape)
    return base.clip(0, 255).astype(np.uint8), noisy.clip(0, 255).astype(np.uint8)


def test_psnr_and_ssim_agree_with_scikit_image() -> None:
    images, others = pictures(4, 40)
    peak = [peak_signal_noise_ratio(a, b) for a, b in zip(images, others, strict=True)]
    np.testing.assert_allclose(psnr(mse(images, others)), peak, atol=1e-3)
    alike = [
        structural_similarity(
            a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        for a, b in zip(images, others, strict=True)
    ]
    np.testing.assert_allclose(ssim(images, others), alike, atol=1e-3)
    assert np.ptp(alike) > 0.01, "the pictures must differ in what is measured"


def test_ssim_of_equal_images_is_one_and_small_ones_are_refused() -> None:
    images, _ = pictures(2, 16)
    np.testing.assert_allclose(ssim(images, images), 1.0, atol=1e-9)
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(images[:, :8], images[:, :8])


def test_errors_by_hand() -> None:
    black, grey = np.zeros((1, 2, 2, 1), np.uint8), np.full((1, 2, 2, 1), 51, np.uint8)
    assert l1(black, grey)[0] == pytest.approx(0.2)
    assert mse(black, grey)[0] == pytest.approx(0.04)


def test_the_frechet_distance_agrees_with_scipy() -> None:
    torch.manual_seed(0)
    reference, judged = torch.randn(300, 8), torch.randn(200, 8) @ torch.randn(8, 8) * 0.5 + 0.3
    distance = FrechetDistance(8, CPU)
    for part in reference.split(64):
        distance.add(part, reference=True)
    for part in judged.split(33):
        distance.add(part, reference=False)
    first, second = reference.double().numpy(), judged.double().numpy()
    root = scipy.linalg.sqrtm(np.cov(first.T) @ np.cov(second.T))
    expected = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(
        np.cov(first.T) + np.cov(second.T) - 2 * root.real
    )
    assert distance.value() == pytest.approx(float(expected), abs=1e-3)


def test_the_inception_score_by_hand_and_in_any_order() -> None:
    certain = torch.eye(4).repeat(10, 1)  # every image certain of its class, all classes equally frequent
    score = InceptionScore(4, splits=1)
    score.add(certain, torch.arange(40))
    assert score.value()[0] == pytest.approx(4.0)

    torch.manual_seed(0)
    mixed, order = torch.randn(60, 4).softmax(1), torch.randperm(60)
    whole, halves = InceptionScore(4), InceptionScore(4)
    whole.add(mixed, torch.arange(60))
    other = InceptionScore(4)  # as another rank would have it
    halves.add(mixed[order[:25]], order[:25])
    other.add(mixed[order[25:]], order[25:])
    halves.sums += other.sums
    assert halves.value() == pytest.approx(whole.value())
    assert 1.0 < whole.value()[0] < 4.0
    with pytest.raises(ValueError, match="10 images"):
        InceptionScore(4).value()


def test_precision_and_recall_tell_quality_from_variety() -> None:
    torch.manual_seed(0)
    everywhere = torch.randn(400, 2)
    narrow, far = 0.05 * torch.randn(400, 2), torch.randn(400, 2) + 50
    good_but_alike = precision_recall(everywhere, narrow, rows=150)
    assert good_but_alike.precision > 0.95
    assert good_but_alike.recall < 0.3
    assert precision_recall(everywhere, far) == (0.0, 0.0)
    assert precision_recall(everywhere, everywhere) == (1.0, 1.0)
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(everywhere, narrow[:3])


def test_precision_and_recall_agree_with_a_loop() -> None:
    torch.manual_seed(1)
    first, second = torch.randn(40, 3), torch.randn(30, 3) + 0.7

    def inside(points: Tensor, manifold: Tensor) -> float:
        radii = [sorted(float((a - b).norm()) for b in manifold)[2] for a in manifold]  # itself, then two others
        return sum(any(float((p - a).norm()) <= r for a, r in zip(manifold, radii, strict=True)) for p in points) / len(
            points
        )

    found = precision_recall(first, second, neighbours=2, rows=7)
    assert found == pytest.approx((inside(second, first), inside(first, second)))


class Plain(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))


class LikeInception(nn.Module):
    def forward(self, images: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        means = images.float().mean(dim=(2, 3))
        return means if return_features else (means / 50).softmax(dim=1)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_feature_networks_from_files(tmp_path: Path) -> None:
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    torch.jit.script(Plain()).save(tmp_path / "plain.pt")
    features, classes = load_features(str(tmp_path / "plain.pt"), CPU)(images)
    np.testing.assert_allclose(features.numpy(), images.mean(axis=(1, 2)), rtol=1e-6)
    assert classes is None

    torch.jit.script(LikeInception()).save(tmp_path / "inception.pt")
    network = load_features(str(tmp_path / "inception.pt"), CPU)
    features, classes = network(images)
    assert classes is not None
    assert len(network.sha256) == 64
    np.testing.assert_allclose(classes.sum(dim=1).numpy(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(features.numpy(), images.mean(axis=(1, 2)), rtol=1e-6)

    (tmp_path / "other.pt").write_bytes(b"not a network")
    with pytest.raises(UserError, match="is not TorchScript"):
        load_features(str(tmp_path / "other.pt"), CPU)
    with pytest.raises(UserError, match="no such file"):
        load_features(str(tmp_path / "absent.pt"), CPU)


def test_a_codebook_by_hand() -> None:
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0], [100.0, 0.0]])
    report = report_codebook(torch.tensor([2, 2, 0, 0]), vectors)
    assert (report.used, report.usage, report.entropy_bits) == (2, 0.5, 1.0)
    assert report.perplexity == pytest.approx(2.0)
    assert report.nearest_least == 0.0, "two codes are the same"
    apart = report_codebook(torch.tensor([1, 1]), torch.tensor([[-1.0], [1.0]]))
    assert apart.nearest_median == pytest.approx(2.0), "each lies one deviation from the mean"
    assert apart.distance_median == pytest.approx(2.0, abs=0.01)
    assert report.shares == [0.5, 0.5, 0.0, 0.0]
    with pytest.raises(ValueError, match="no codes"):
        report_codebook(torch.zeros(4), vectors)


def test_distances_of_all_pairs_of_codes() -> None:
    vectors = torch.randn(2500, 6, generator=torch.Generator().manual_seed(0))
    report = report_codebook(torch.arange(2500) % 7, vectors)
    spread = float((vectors - vectors.mean(0)).square().sum(1).mean().sqrt())
    pairs = scipy.spatial.distance.pdist(vectors.double().numpy()) / spread
    square = scipy.spatial.distance.squareform(pairs) + 1e9 * np.eye(len(vectors))
    assert report.nearest_median == pytest.approx(float(np.median(square.min(0))), rel=1e-3)
    assert report.nearest_least == pytest.approx(pairs.min(), rel=1e-6)
    assert report.distance_median == pytest.approx(np.median(pairs), abs=0.01)
    counted = np.histogram(pairs.clip(max=3.95), bins=40, range=(0, 4))[0] / len(pairs)
    np.testing.assert_allclose(report.distances, counted, atol=1e-5)
    assert len(report.shares) == 64
    assert sum(report.shares) == pytest.approx(1, abs=1e-4)


def test_surgery_adds_up_and_finds_what_was_planted() -> None:
    torch.manual_seed(0)
    level = PositionCounts(2, 4)
    # Position 0 is always code 0; the others are code 1 or 2 with equal chance; code 3 is dead.
    grids = torch.randint(1, 3, (4096, 2, 2))
    grids[:, 0, 0] = 0
    for part in grids.split(1000):
        level.add(part)
    # The class is the code at position 1.
    seen = Counter((int(grid[0, 1]), str(grid.tolist())) for grid in grids)
    cut = dissect([level], seen)
    assert cut.uniform == 8.0
    assert cut.unused + cut.placed + cut.positions == pytest.approx(cut.uniform)
    assert cut.positions == pytest.approx(3.0, abs=0.01)
    assert cut.mutual_information == pytest.approx(3.0, abs=0.01), "eight grids, all as frequent"
    assert cut.information_given_class == pytest.approx(2.0, abs=0.01), "four of them in each class"
    assert cut.divergence_uniform == pytest.approx(5.0, abs=0.01)
    assert torch.equal(level.of_codes, torch.bincount(grids.flatten(), minlength=4))
    assert entropy_bits(torch.ones(8)) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="no images"):
        dissect([level], {})


def test_the_divergence_from_the_learned_prior_is_that_of_the_distributions() -> None:
    """Against the sum over all grids that the definition has: KL(q(z | y) || p(z | y)), a mean over the images."""
    random = np.random.default_rng(0)
    labels, codes = random.integers(0, 2, 500), random.integers(0, 3, 500)
    prior = random.dirichlet(np.ones(3), size=2)
    learned = -np.log2(prior[labels, codes]).mean()
    joint = np.histogram2d(labels, codes, bins=(2, 3))[0] / 500
    given = joint / joint.sum(1, keepdims=True)
    expected = float((joint * np.log2(given / prior)).sum())
    level = PositionCounts(1, 3)
    level.add(torch.from_numpy(codes)[:, None, None])
    cut = dissect([level], Counter((int(y), str(z)) for y, z in zip(labels, codes, strict=True)))
    figures = {
        "bits_per_dim_pixels": 0.0,
        "bits_per_dim_codes": learned / 12,
        "code_bits_mutual_information_given_class": cut.information_given_class,
    }
    assert learned_figures(figures, 12)["code_bits_kl_learned"] == pytest.approx(expected)
    assert expected > 0


def shown(count: int, seed: int) -> Shown:
    random = np.random.default_rng(seed)
    images, others = pictures(count, 16, seed)
    codes = {"bottom": random.integers(0, 8, (count, 4, 4)), "top": random.integers(0, 4, (count, 2, 2))}
    grids = {name: grid.astype(np.uint16) for name, grid in codes.items()}
    density = np.zeros(count)
    return Shown(np.arange(count), np.zeros(count, np.int64), images, grids, grids, density, others.astype(np.float32))


BOOKS = {"bottom": (torch.arange(8.0)[:, None], 4), "top": (torch.arange(4.0)[:, None] ** 2, 2)}


def part_of(everything: Shown, rank: int, world: int) -> Shown:
    mine = slice(rank, None, world)
    codes = {name: grid[mine] for name, grid in everything.encoded.items()}
    whole = everything.numbers, everything.labels, everything.images, everything.log_posterior, everything.means
    numbers, labels, images, density, means = (array[mine] for array in whole)
    return Shown(numbers, labels, images, codes, codes, density, means)


def measured_on_ranks(network: Path) -> dict[str, float]:
    with process_group("cpu", 60) as ranks:
        mine = part_of(shown(60, 3), ranks.rank, ranks.world)
        measures = [CodeStatistics(BOOKS), FeatureDistance(load_features(str(network), CPU), 16)]
        for measure in measures:
            measure.add(mine)
        return {name: value for measure in measures for name, value in measure.figures(ranks).items()}


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_measures_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    torch.jit.script(Plain()).save(tmp_path / "plain.pt")
    (alone,), found = (run_ranks(world, measured_on_ranks, tmp_path / "plain.pt") for world in (1, 2))
    assert alone["rfid_images"] == 60
    assert alone["rfid"] > 0
    assert alone["code_bits_uniform"] == 16 * 3 + 4 * 2
    assert alone["code_bits_mutual_information"] == pytest.approx(math.log2(60)), "all grids differ"
    assert alone["nearest_code_median_bottom"] == pytest.approx(1 / np.arange(8).std())
    for each in found:
        assert each.keys() == alone.keys()
        for name, value in alone.items():
            assert each[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6)), name
