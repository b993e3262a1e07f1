"""`.npz` files that are larger than memory: written row by row, read through a mapping."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from vqscale.errors import UserError

_LOCAL_HEADER = 30  # bytes of a zip member's own header before its name; lengths of name and extra field at 26 and 28


class Streamed(NamedTuple):
    """An array whose rows come one after the other."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    parts: Iterable[NDArray[Any]]
    """Arrays of consecutive rows."""


def write_npz(path: Path, arrays: Mapping[str, Streamed]) -> None:
    """Write what `numpy.savez` writes, without holding it in memory; atomically, and equal arrays give equal bytes.

    Raises:
        ValueError: the parts of an array have more or fewer bytes than its shape says.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                _write_member(archive, name, array)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def map_npz(path: Path, name: str) -> NDArray[Any]:
    """An array of an `.npz` that is not compressed, mapped into memory: only what is used is read.

    Raises:
        UserError: no such file, no such array in it, or it is compressed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{name}.npy")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"holds no array {name} ({error})", where=str(path), mend="write it again") from None
    if member.compress_type != zipfile.ZIP_STORED:
        raise UserError("is compressed and cannot be mapped", where=str(path), mend="write it by numpy.savez")
    with path.open("rb") as file:
        file.seek(member.header_offset)
        local = file.read(_LOCAL_HEADER)
        file.seek(int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little"), os.SEEK_CUR)
        npy.read_magic(file)
        shape, fortran, dtype = npy.read_array_header_1_0(file)
        return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def _write_member(archive: zipfile.ZipFile, name: str, array: Streamed) -> None:
    expected, written = int(np.prod(array.shape)) * array.dtype.itemsize, 0
    # A ZipInfo of our own: with a name alone the member would carry the time of day.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        head = {"descr": npy.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
        npy.write_array_header_1_0(member, head)
        for part in array.parts:
            written += member.write(np.ascontiguousarray(part, array.dtype).data.cast("B"))
    if written != expected:
        raise ValueError(f"{written} bytes of {name}, its shape {array.shape} needs {expected}")
