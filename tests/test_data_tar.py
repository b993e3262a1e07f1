import io
import tarfile
from pathlib import Path

import pytest

from vqscale.data import tar
from vqscale.errors import UserError

SAMPLES = [
    ("a/b", {"png": b"x" * 600, "cls": b"3"}),
    ("a/c", {"png": b"", "cls": b"4", "seg.png": b"yy"}),
    ("d" * 90 + "/" + "e" * 80, {"jpg": b"long"}),
]


def written(samples=SAMPLES) -> bytes:
    file = io.BytesIO()
    assert tar.write(file, samples) == len(file.getvalue())
    return file.getvalue()


def test_writes_what_webdataset_writes():
    from webdataset.writer import TarWriter

    file = io.BytesIO()
    with TarWriter(file, mtime=0, user="vqscale", group="vqscale", encoder=False) as writer:
        for key, fields in SAMPLES:
            writer.write({"__key__": key, **fields})
    assert file.getvalue() == written()


def test_webdataset_reads_the_same_samples(tmp_path: Path):
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    content = written()
    members = tar_file_iterator(io.BytesIO(content))
    theirs = list(group_by_keys({**member, "__url__": "s.tar"} for member in members))
    ours = tar.samples(content)
    assert [sample.key for sample in ours] == [sample["__key__"] for sample in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        got = {name: content[at : at + size] for name, (at, size) in mine.fields.items()}
        assert got == {name: value for name, value in other.items() if not name.startswith("__")}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_every_format_of_tarfile(form: int):
    names = ["plain.txt", "dir/ümlaut.txt", "x" * 90 + "/" + "y" * 90 + ".jpg"]
    if form != tarfile.USTAR_FORMAT:
        names += ["deep/" * 60 + "z.png"]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, pax_headers={"comment": "hello"}) as archive:
        folder = tarfile.TarInfo("dir")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = number * 700, 1.5
            archive.addfile(info, io.BytesIO(bytes([number]) * info.size))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "l" * 150 if form != tarfile.USTAR_FORMAT else "l"
        archive.addfile(link)
    content = file.getvalue()
    found = list(tar.members(content))
    assert [member.name for member in found] == names
    for number, member in enumerate(found):
        assert content[member.offset : member.offset + member.size] == bytes([number]) * number * 700


def test_reads_a_pax_size_that_the_header_cannot_hold():
    info = tarfile.TarInfo("big.bin")
    info.size = 600
    record = info.create_pax_header({**info.get_info(), "size": 600}, "utf-8")
    content = record + b"b" * 600 + bytes(424) + bytes(1024)
    assert [tuple(member)[::2] for member in tar.members(content)] == [("big.bin", 600)]


@pytest.mark.parametrize("length", [100, 700, 512 * 3, 512 * 5 + 9])
def test_refuses_truncated_tars(length: int):
    with pytest.raises(UserError, match=r"s\.tar: is cut off"):
        list(tar.members(written()[:length], "s.tar"))


def test_refuses_what_is_no_tar():
    with pytest.raises(UserError, match="no tar, or damaged at byte 0"):
        list(tar.members(b"hello world" * 200))
    damaged = bytearray(written())
    damaged[3] ^= 1
    with pytest.raises(UserError, match="damaged"):
        list(tar.members(bytes(damaged)))


def test_refuses_a_doubled_extension():
    with pytest.raises(UserError, match="twice"):
        tar.samples(written([("a", {"png": b"1"}), ("a", {"png": b"2"})]))


def test_leaves_metadata_and_bare_names_out():
    content = written([("__meta__/x", {"json": b"{}"}), ("a", {"PNG": b"1"}), ("dir/.hidden", {"x": b""})])
    assert [(s.key, list(s.fields)) for s in tar.samples(content)] == [("a", ["png"])]
