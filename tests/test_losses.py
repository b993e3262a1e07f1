"""Each term against its formula, and its gradient against autograd through the whole."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from vqscale.config.vqvae2 import Adversarial
from vqscale.errors import UserError
from vqscale.models.convnets import Widths
from vqscale.models.discriminator import PatchDiscriminator
from vqscale.models.losses import (
    PIXEL_LOSSES,
    adaptive_weight,
    carry,
    discriminator_loss,
    generator_loss,
    kernel_gradient,
)
from vqscale.models.lpips import LPIPS, STAGES, load_lpips
from vqscale.models.quantizer import Codebook
from vqscale.models.vqvae import VQVAE, LevelShape

torch.set_num_threads(1)  # what is computed is small: more threads would wait for each other

WHERE = "tokenizer.losses.perceptual.weights"


def images(batch: int = 3, side: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tokenizer(factor: int = 4) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE([Codebook(8, 4)], [LevelShape(factor, Widths(8, 1, 4))])


# --- pixels and hinges


def test_pixel_losses_by_hand() -> None:
    a, b = torch.tensor([0.0, 1.0, -1.0, 0.5]), torch.tensor([0.0, -1.0, -1.0, 0.0])
    assert PIXEL_LOSSES["mse"](a, b) == pytest.approx(4.25 / 4)
    assert PIXEL_LOSSES["l1"](a, b) == pytest.approx(2.5 / 4)


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, -0.5, 1.0])
    assert discriminator_loss(real, fake) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 0.5 + 2) / 3))
    assert generator_loss(fake) == pytest.approx(1.5 / 3)


# --- the adaptive weight


@pytest.mark.parametrize("factor", [2, 4])
def test_kernel_gradient_is_that_of_the_parameter(factor: int) -> None:
    model, target = tokenizer(factor), images(seed=1)
    output = model(images())
    loss = F.mse_loss(output.images, target)
    (direct,) = torch.autograd.grad(loss, model.to_pixels.weight, retain_graph=True)
    (pixels,) = torch.autograd.grad(loss, output.images)
    torch.testing.assert_close(kernel_gradient(model.to_pixels, output.features, pixels), direct)


def test_kernel_gradient_needs_no_parameter() -> None:
    """Under a strategy that spreads the parameters there may be nothing in it."""
    model, target = tokenizer(), images(seed=1)
    output = model(images())
    (pixels,) = torch.autograd.grad(F.mse_loss(output.images, target), output.images)
    expected = kernel_gradient(model.to_pixels, output.features, pixels)
    model.to_pixels.weight.data = torch.empty(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernel_gradient(model.to_pixels, output.features, pixels), expected)


def test_adaptive_weight_is_the_clipped_ratio() -> None:
    own, other = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert adaptive_weight(own, other) == pytest.approx(5 / 2.0001)
    assert adaptive_weight(own, torch.zeros(2)) == pytest.approx(1e4)  # 5 / 1e-4, clipped
    assert adaptive_weight(torch.zeros(2), other) == 0


def test_carry_has_the_value_and_the_gradient_it_is_given() -> None:
    x, gradient = images().requires_grad_(), images(seed=1)
    carried = carry(torch.tensor(7.0), 2 * x, gradient)
    assert carried == 7
    carried.backward()
    torch.testing.assert_close(x.grad, 2 * gradient)


# --- the discriminator


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_discriminator_judges_patches(layers: int) -> None:
    side = Adversarial(start=0, layers=layers).smallest_image
    network = PatchDiscriminator(4, layers)
    assert network(images(2, side)).shape == (2, 1, 1, 1)
    larger = 4 * side
    assert network(images(2, larger)).shape == (2, 1, *(2 * [larger // 2**layers - 2]))
    with pytest.raises(RuntimeError):
        network(images(2, side // 2))


def test_a_patch_is_70_pixels_wide() -> None:
    network = PatchDiscriminator(4, 3)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]
    x = images(1, 128).requires_grad_()
    network(x)[0, 0, 7, 7].backward()
    seen = x.grad.abs().sum(dim=(0, 1)) > 0
    assert [int(seen.any(dim=side).sum()) for side in (0, 1)] == [70, 70]


def test_an_image_is_judged_whatever_the_batch() -> None:
    """No statistics of the batch: they would depend on the number of ranks."""
    network, x = PatchDiscriminator(8, 2), images(5, 24)
    torch.testing.assert_close(network(x)[3:4], network(x[3:4]))
    assert not list(network.buffers())


# --- LPIPS


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random ones, under torchvision's and lpips' names."""
    generator, found, below = torch.Generator().manual_seed(0), {}, 3
    for stage, (channels, numbers) in enumerate(STAGES):
        for number in numbers:
            shape = (channels, below, 3, 3)
            found[f"features.{number}.weight"] = torch.randn(shape, generator=generator) * (2 / (9 * below)) ** 0.5
            found[f"features.{number}.bias"] = torch.randn(channels, generator=generator) * 0.1
            below = channels
        found[f"lin{stage}.model.1.weight"] = torch.rand(1, channels, 1, 1, generator=generator)
    return found


def by_formula(weights: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Equation 1 of Zhang et al. over VGG16's layers as torchvision lists them."""
    layout = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (torch.cat([a, b]) - shift.view(3, 1, 1)) / scale.view(3, 1, 1)
    number, total, stages = 0, torch.zeros(len(a)), []
    for entry, following in zip(layout, [*layout[1:], "M"], strict=True):
        if entry == "M":
            x, number = F.max_pool2d(x, 2), number + 1
            continue
        x = F.relu(F.conv2d(x, weights[f"features.{number}.weight"], weights[f"features.{number}.bias"], padding=1))
        number += 2
        if following == "M":
            stages.append(x)
    for stage, features in enumerate(stages):
        unit = features / (features.norm(dim=1, keepdim=True) + 1e-10)
        first, second = unit.chunk(2)
        weighted = (first - second) ** 2 * weights[f"lin{stage}.model.1.weight"]
        total = total + weighted.sum(dim=1).mean(dim=(1, 2))
    return total


def test_lpips_is_its_formula(weights: dict[str, Tensor]) -> None:
    network, a, b = LPIPS(weights), images(2, 32), images(2, 32, 1)
    torch.testing.assert_close(network(a, b), by_formula(weights, a, b), rtol=1e-4, atol=1e-6)
    assert not network(a, a).any()
    x, y = a.clone().requires_grad_(), a.clone().requires_grad_()
    network(x, b).sum().backward()
    by_formula(weights, y, b).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_lpips_of_dead_features_has_a_gradient(weights: dict[str, Tensor]) -> None:
    """Where all features are zero, a square root would have an infinite one."""
    dead = {name: -value.abs() if name.endswith("bias") else value * 0 for name, value in weights.items()}
    x = images(1, 16).requires_grad_()
    LPIPS(dead)(x, images(1, 16, 1)).sum().backward()
    assert x.grad.isfinite().all()


def lpips_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the state of `lpips.LPIPS(net="vgg")` names them."""
    parts = {number: part for part, (_, numbers) in enumerate(STAGES, 1) for number in numbers}
    named = {}
    for name, value in weights.items():
        kind, number, *rest = name.split(".")
        named[f"net.slice{parts[int(number)]}.{number}.{rest[0]}" if kind == "features" else name] = value
    return named


def test_weights_are_read_from_any_of_the_files_people_have(weights: dict[str, Tensor], tmp_path: Path) -> None:
    a, b = images(1, 16), images(1, 16, 1)
    expected = LPIPS(weights)(a, b)
    convolutions = {name: value for name, value in weights.items() if name.startswith("features")}
    linears = {name: value for name, value in weights.items() if name.startswith("lin")}
    save_file(lpips_names(weights), tmp_path / "whole.safetensors")
    torch.save(convolutions | {"classifier.0.weight": torch.zeros(2)}, tmp_path / "vgg16.pth")
    torch.save(linears, tmp_path / "vgg.pth")
    for names in (["whole.safetensors"], ["vgg16.pth", "vgg.pth"]):
        network = load_lpips([str(tmp_path / name) for name in names], WHERE)
        torch.testing.assert_close(network(a, b), expected)


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return (exec, ("raise SystemExit('code ran')",))


def test_faulty_weights_are_refused_in_one_line(weights: dict[str, Tensor], tmp_path: Path) -> None:
    def fault(*paths: Path) -> str:
        with pytest.raises(UserError) as caught:
            load_lpips([str(path) for path in paths], WHERE)
        line = str(caught.value)
        assert "\n" not in line
        assert line.startswith(WHERE)
        return line

    linears = {name: value for name, value in weights.items() if name.startswith("lin")}
    files = {
        "short.safetensors": linears,
        "no-linear.safetensors": {name: value for name, value in weights.items() if not name.startswith("lin")},
        "shape.safetensors": {"features.0.weight": torch.zeros(64, 1, 3, 3), "features.0.bias": torch.zeros(64)},
    }
    for name, content in files.items():
        save_file(content, tmp_path / name)
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "malicious.pth").write_bytes(pickle.dumps({"features.0.weight": Malicious()}))
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    torch.save({"state": Malicious()}, tmp_path / "malicious-zip.pth")
    assert "no file" in fault(tmp_path / "absent.pth")
    assert "no file" in fault(tmp_path)
    assert "features.0.weight is missing" in fault(tmp_path / "short.safetensors")
    assert "lin0.model.1.weight is missing" in fault(tmp_path / "no-linear.safetensors")
    assert "features.0.weight has shape (64, 1, 3, 3), not (64, 3, 3, 3)" in fault(tmp_path / "shape.safetensors")
    assert "holds a Tensor" in fault(tmp_path / "tensor.pth")
    for name in ("text.pth", "text.safetensors", "malicious.pth", "malicious-zip.pth"):
        assert "neither safetensors nor tensors" in fault(tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_that_were_cut_off_are_refused_in_one_line(zipped: bool, tmp_path: Path) -> None:
    """A download that broke off; torchvision's files have the format before zip."""
    whole, cut = tmp_path / "whole.pth", tmp_path / "cut.pth"
    torch.save({"a": torch.zeros(3), "b": torch.ones(2)}, whole, _use_new_zipfile_serialization=zipped)
    content = whole.read_bytes()
    for length in range(0, len(content) - 1, max(1, len(content) // 150)):
        cut.write_bytes(content[:length])
        with pytest.raises(UserError, match=f"^{WHERE}: .*cut.pth (is neither|holds a)") as caught:
            load_lpips([str(cut)], WHERE)
        assert "\n" not in str(caught.value)
