"""Checkpoints: bit-exact, committed, checked before they are used."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqscale.errors import UserError
from vqscale.files import read_json, write_json
from vqscale.models.quantizer import Codebook
from vqscale.training import checkpoint
from vqscale.training.optimizers import fresh_state
from vqscale.training.pieces import Piece, whole

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


class Network(nn.Module):
    """A kernel in channels_last, a matrix, a codebook, and a buffer that is no float."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(3, width, 3)
        self.matrix = nn.Linear(width, 2)
        self.book = Codebook(5, 3)
        self.register_buffer("steps", torch.tensor(7))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix(self.kernel(x).mean(dim=(2, 3)))


def trained(seed: int = 0, steps: int = 3) -> tuple[Network, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.8, 0.9), fused=True)
    walk(model, optimizer, range(steps))
    return model, optimizer


def walk(model: Network, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(step))
        model(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def pieces(model: Network, optimizer: torch.optim.Optimizer) -> list[Piece]:
    kept = [whole(f"model/{name}", value) for name, value in model.state_dict().items()]
    moments = [
        whole(f"optimizer/adamw/{key}/{name}", value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    ]
    return kept + moments


def tensors(model: Network, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {piece.name: piece.local for piece in pieces(model, optimizer)}


def save(folder: Path, step: int, seed: int = 0, keep: int = 9) -> checkpoint.Checkpoint:
    return checkpoint.save(folder, step, tensors(*trained(seed)), keep)


def load(found: checkpoint.Checkpoint) -> tuple[Network, torch.optim.Optimizer]:
    model, optimizer = trained(seed=99, steps=0)
    for parameter in model.parameters():
        optimizer.state[parameter] = fresh_state(optimizer, parameter.detach())
    found.fill(pieces(model, optimizer))
    return model, optimizer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    model, optimizer = trained()
    loaded, its_optimizer = load(save(tmp_path, 3))
    assert same(loaded.state_dict(), dict(model.state_dict()))
    assert same(its_optimizer.state_dict(), optimizer.state_dict())
    assert loaded.kernel.weight.is_contiguous(memory_format=torch.channels_last)


def test_training_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    """Fused AdamW walks memory by address: loaded moments must lie as their channels_last kernel does."""
    whole, whole_optimizer = trained()
    walk(whole, whole_optimizer, range(3, 8))
    resumed, optimizer = load(save(tmp_path, 3))
    walk(resumed, optimizer, range(3, 8))
    assert same(resumed.state_dict(), dict(whole.state_dict()))
    moments = optimizer.state[resumed.kernel.weight]["exp_avg"]
    assert moments.stride() == resumed.kernel.weight.stride()


def test_nothing_in_it_is_a_pickle(tmp_path: Path) -> None:
    save(tmp_path, 3)
    for name in FILES:
        content = (tmp_path / "step-00000003" / name).read_bytes()
        assert not content.startswith((b"PK", b"\x80"))
        assert b"torch._utils" not in content
        assert b"__reduce__" not in content
    assert names(tmp_path / "step-00000003") == sorted(FILES)


def test_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    one, again, other = (save(tmp_path / str(n), 3, seed).fingerprint() for n, seed in enumerate((0, 0, 1)))
    assert one == again != other
    model, optimizer = trained()
    model.book.counts[0] += 1e-6
    moved = checkpoint.save(tmp_path / "moved", 3, tensors(model, optimizer), 1)
    assert moved.fingerprint() != one


def test_newest_of_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere") == (None, [])
    with pytest.raises(UserError, match="no checkpoint; run the stage 'tokenizer' first"):
        checkpoint.require(tmp_path / "nowhere", "tokenizer")


@pytest.mark.fault
@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_passed_over(name: str, tmp_path: Path) -> None:
    save(tmp_path, 3)
    save(tmp_path, 6)
    file = tmp_path / "step-00000006" / name
    content = file.read_bytes()
    spaces = {place for place, byte in enumerate(content) if byte in b" \n"} if name == "manifest.json" else set()
    places = sorted(set(range(0, len(content), max(1, len(content) // 60))) - spaces)
    for place in places:
        file.write_bytes(content[:place] + bytes([content[place] ^ 0x81]) + content[place + 1 :])
        found, notes = checkpoint.newest(tmp_path)
        assert found is not None
        assert found.step == 3, f"byte {place}"
        assert len(notes) == 1
        assert "step-00000006" in notes[0]
        assert "manifest" in notes[0]
    file.write_bytes(content)
    assert checkpoint.newest(tmp_path)[0] == checkpoint.Checkpoint(tmp_path / "step-00000006", 6)


@pytest.mark.fault
@pytest.mark.parametrize("name", FILES)
def test_torn_ones_are_passed_over(name: str, tmp_path: Path) -> None:
    save(tmp_path, 3)
    save(tmp_path, 6)
    file = tmp_path / "step-00000006" / name
    content = file.read_bytes()
    for kept in (0, 1, len(content) // 2, len(content) - 2):
        file.write_bytes(content[:kept])
        found, notes = checkpoint.newest(tmp_path)
        assert (found and found.step, len(notes)) == (3, 1), kept
    file.unlink()
    found, (note,) = checkpoint.newest(tmp_path)
    assert found is not None
    assert ("was never committed" if name == "manifest.json" else f"{name} is missing") in note
    shutil.rmtree(tmp_path / "step-00000003")
    with pytest.raises(UserError, match=r"step-00000006: .*; passed over"):
        checkpoint.require(tmp_path, "prior")


def test_another_checkpoints_manifest_does_not_pass(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save(tmp_path, 6, seed=1)
    shutil.rmtree(tmp_path / "step-00000006")
    shutil.copytree(tmp_path / "step-00000003", tmp_path / "step-00000006")
    found, (note,) = checkpoint.newest(tmp_path)
    assert (found and found.step) == 3
    assert "is that of vqscale-checkpoint/0 step 3" in note


@pytest.mark.parametrize("content", [[], {}, None, 3, {"files": {}}, {"format": "x", "step": "y", "files": []}])
def test_strange_manifests(content: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "step-00000003" / "manifest.json", content)
    assert checkpoint.newest(tmp_path)[0] is None


def test_retention(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000006", "step-00000008"]


def test_an_old_one_goes_only_after_the_new_one_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2, keep=1)
    removed: list[str] = []
    rmtree = shutil.rmtree

    def watch(path: Path, **options: Any) -> None:
        if path.exists() and not path.name.startswith("."):
            removed.append(path.name)
            assert checkpoint.find_fault(tmp_path / "step-00000004") is None
        rmtree(path, **options)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", watch)
    save(tmp_path, 4, keep=1)
    assert removed == ["step-00000002"]


def test_damaged_later_ones_do_not_push_out_good_ones(tmp_path: Path) -> None:
    """Step 8 is torn, the run goes on from 4 and saves 6: keeping the 'newest' by name would keep step 8 alone."""
    for step in (4, 8):
        save(tmp_path, step, keep=2)
    (tmp_path / "step-00000008" / "manifest.json").unlink()
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["step-00000006"]
    found, notes = checkpoint.newest(tmp_path)
    assert (found and found.step, notes) == (6, [])


@pytest.mark.fault
@pytest.mark.parametrize("call", ["save_file", "write_json", "_sha256", "_sync"])
def test_a_save_that_dies_leaves_the_old_one(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3, keep=1)
    real, calls = getattr(checkpoint, call), 0

    def die_at(number: int) -> None:
        nonlocal calls
        calls = 0

        def dying(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError("no space left on device")
            return real(*arguments)

        monkeypatch.setattr(checkpoint, call, dying)

    for number in (1, 2):
        die_at(number)
        with pytest.raises(OSError, match="no space"):
            save(tmp_path, 6, seed=1, keep=1)
        assert [name for name in names(tmp_path) if name.startswith("step-")] == ["step-00000003"]
        found, notes = checkpoint.newest(tmp_path)
        assert (found and found.step, notes) == (3, [])
    monkeypatch.setattr(checkpoint, call, real)
    save(tmp_path, 6, seed=1, keep=1)
    assert names(tmp_path) == ["step-00000006"], "what the dead saves left is gone"


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    first = save(tmp_path, 3).fingerprint()
    assert save(tmp_path, 3, seed=1).fingerprint() != first
    assert checkpoint.newest(tmp_path)[1] == []


def test_another_architecture_is_one_clear_line(tmp_path: Path) -> None:
    found = save(tmp_path, 3)
    for other in (Network(width=6), nn.Linear(2, 2)):
        with pytest.raises(UserError, match=r"does not fit the recipe's network .*resume with the settings") as caught:
            checkpoint.load_into(other, found)
        assert len(str(caught.value).splitlines()) == 1
        assert str(found.path) in str(caught.value)


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    found = save(tmp_path, 3)
    manifest = read_json(found.path / "manifest.json")
    assert manifest["step"] == 3
    assert set(manifest["files"]) == set(FILES) - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert (found.path / name).stat().st_size == entry["bytes"]
