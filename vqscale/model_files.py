"""Exported models on disk or behind a URL: weights in safetensors, `config.json`, and a card for people.

`config.json` is written last and names the other files with their hashes: without it there is no model, and with it
they are whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from vqscale import storage
from vqscale.config.exported import CONFIG, Exported, StoredFile
from vqscale.config.layout import RunLayout
from vqscale.config.load import parse
from vqscale.errors import UserError

_MEND = "export the run again"


def is_run(place: str | Path) -> bool:
    """Whether a place is a run directory."""
    path = storage.local_path(place)
    return path is not None and RunLayout(path).recipe.exists()


def read_exported(place: str | Path) -> Exported:
    """What an exported model says of itself.

    Raises:
        UserError: there is none, or it is of another format.
    """
    where = storage.join(place, CONFIG)
    if storage.size(where) is None:
        mend = "name a run directory, or what `vqscale export` has written"
        raise UserError("holds neither a run nor an exported model", where=str(place), mend=mend)
    try:
        tree = json.loads(storage.read_bytes(where))
    except ValueError as error:
        raise UserError(f"is not JSON ({error})", where=where, mend=_MEND) from None
    if not isinstance(tree, dict) or tree.get("format") != Exported.model_fields["format"].default:
        raise UserError("is not the config of an exported model", where=where, mend=_MEND)
    return parse(Exported, tree, where)


def fill(network: nn.Module, place: str | Path, exported: Exported, name: str) -> None:
    """Give a network the weights and buffers of a file.

    Raises:
        UserError: the file is absent, or another one than `config.json` names, or does not fit the network.
    """
    where, expected = storage.join(place, name), exported.files.get(name)
    data = storage.read_bytes(where)
    if expected is None or stored(data) != expected:
        raise UserError("is not the file that config.json names (another hash)", where=where, mend=_MEND)
    try:
        network.load_state_dict(load(data))
    except (SafetensorError, RuntimeError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"does not fit config.json ({what})", where=where, mend=_MEND) from None


def pack_weights(network: nn.Module) -> bytes:
    """A network's weights and buffers as a safetensors file."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()})


def stored(data: bytes) -> StoredFile:
    """How `config.json` names a file."""
    return StoredFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def write_exported(place: str | Path, exported: Exported, files: Mapping[str, bytes]) -> None:
    """Write the files, then `config.json`."""
    for name, data in files.items():
        storage.write_bytes(storage.join(place, name), data)
    text = json.dumps(exported.model_dump(mode="json"), indent=1, ensure_ascii=False)
    storage.write_bytes(storage.join(place, CONFIG), (text + "\n").encode())
