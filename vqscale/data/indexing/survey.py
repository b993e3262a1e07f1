"""What a shard of any origin holds: its samples, their images, and what could be their labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from vqscale import storage
from vqscale.data import images, tar
from vqscale.data.bad import BadSample
from vqscale.data.image_source import image_extension, leads_outside
from vqscale.data.indexing.label_rules import JSON_KEYS, Tally
from vqscale.data.labels import stored_label
from vqscale.data.manifest import Shard, hash_bytes

HEADERS = 64
"""Images of a shard whose headers are looked at."""
_GZIP = b"\x1f\x8b"


@dataclass
class Survey:
    """What one shard holds, or several."""

    shards: list[Shard] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    """Name of each shard that is cut off or damaged → what is wrong; its whole samples are counted."""
    images: Counter[str] = field(default_factory=Counter)
    """Extension → samples whose image has it."""
    without: int = 0
    """Samples without an image."""
    example: str = ""
    """One of these, with its members."""
    unsafe: int = 0
    """Samples whose key is absolute or leads to a parent folder."""
    headers: Counter[tuple[str, int, int]] = field(default_factory=Counter)
    """(format, width, height) → images among those that were looked at."""
    unreadable: int = 0
    """Images without a readable header among those that were looked at."""
    labels: dict[str, Tally] = field(default_factory=dict)
    """Rule → the values that samples have by it; under `folder` whole folder paths."""

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    def merge(self, other: Survey) -> None:
        """Add what other shards hold."""
        self.shards += other.shards
        self.damaged |= other.damaged
        self.images.update(other.images)
        self.without += other.without
        self.example = self.example or other.example
        self.unsafe += other.unsafe
        self.headers.update(other.headers)
        self.unreadable += other.unreadable
        for rule, tally in other.labels.items():
            self.labels.setdefault(rule, Tally()).merge(tally)

    def image_size(self) -> int | None:
        """Side of the images, where all that were looked at are squares of one size."""
        sides = {side for _, *sides in self.headers for side in sides}
        return sides.pop() if len(sides) == 1 else None


def survey(where: str, name: str, *, label: str = "auto", hashes: bool = True) -> Survey:
    """Read one shard.

    Args:
        where: its path or URL.
        name: what it is to be called.
        label: `auto`, or the one rule that is asked for (`Manifest.label`).
        hashes: whether its bytes are hashed.

    Raises:
        UserError: it cannot be read at all.
    """
    buffer = storage.open_shard(where)
    samples, fault = tar.whole_samples(buffer, where)
    found = Survey()
    if fault:
        del samples[-1:]  # it may lack members
        found.damaged[name] = "is compressed" if buffer[:2] == _GZIP else fault.what
    digest = hash_bytes(buffer) if hashes else ""
    found.shards.append(Shard(name=name, samples=len(samples), bytes=len(buffer), sha256=digest))
    spans = [span for sample in samples if (span := _image(sample, found))]
    _look(buffer, spans, found)
    for rule in _rules(buffer, samples, label):
        found.labels[rule] = _tally(buffer, samples, rule)
    return found


def _image(sample: tar.Sample, found: Survey) -> tuple[int, int] | None:
    """Where the image of a sample lies; counts it."""
    found.unsafe += leads_outside(sample.key)
    extension = image_extension(sample)
    if extension:
        found.images[extension] += 1
        return sample.fields[extension]
    found.without += 1
    found.example = found.example or f"{sample.key} with {', '.join(f'.{extension}' for extension in sample.fields)}"
    return None


def _look(buffer: storage.Buffer, spans: Sequence[tuple[int, int]], found: Survey) -> None:
    """Read headers of images, evenly spread over the shard."""
    for offset, size in spans[:: -(-len(spans) // HEADERS) or 1]:
        try:
            found.headers[images.probe(buffer[offset : offset + size])] += 1
        except BadSample:
            found.unreadable += 1


def _rules(buffer: storage.Buffer, samples: Sequence[tar.Sample], label: str) -> list[str]:
    """The rules by which samples of a shard may have a label; `.cls` rules out all others."""
    if label != "auto":
        return [] if label == "none" else [label.partition(":")[0] if label.startswith("folder") else label]
    extensions = {extension for sample in samples for extension in sample.fields}
    if "cls" in extensions:
        return ["cls"]
    texts = ["txt"] if "txt" in extensions else []
    return [*_json_rules(buffer, samples), *texts, "folder"]


def _json_rules(buffer: storage.Buffer, samples: Sequence[tar.Sample]) -> list[str]:
    """Those of `JSON_KEYS` that occur at all, so that most JSON need not be parsed."""
    wanted = {key: f'"{key}"'.encode() for key in JSON_KEYS}
    for offset, size in (sample.fields["json"] for sample in samples if "json" in sample.fields):
        text = buffer[offset : offset + size]
        for key in [key for key, quoted in wanted.items() if quoted in text]:
            del wanted[key]
        if not wanted:
            break
    return [f"json:{key}" for key in JSON_KEYS if key not in wanted]


def _tally(buffer: storage.Buffer, samples: Sequence[tar.Sample], rule: str) -> Tally:
    tally = Tally()
    for sample in samples:
        if rule == "folder":
            tally.add(sample.key.removeprefix("./").rpartition("/")[0] or None)
            continue
        try:
            tally.add(stored_label(buffer, sample, rule))
        except BadSample:
            tally.bad += 1
    return tally
