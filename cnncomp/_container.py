"""The bytes of a saved model: a JSON document and tensors in one safetensors file with a version and a checksum.

Metadata: the format version ("cnncomp"), a checksum ("sha256", of all bytes of the file with 64 zeros in its own place), and
the document ("model"). Where it makes the file smaller by a tenth, what the file would be without checksum is compressed
and becomes the only tensor, "zlib", and the metadata hold its "size".
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zlib
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from cnncomp._version import __version__

FORMAT_VERSION = 1

#: Compressed where it becomes smaller than this fraction. Floats alone do not, and would take seconds to unpack.
PACKED_BELOW = 0.9
#: Bytes that are unpacked at a time.
PIECE = 2**18

_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')

Document = dict[str, Any]
Tensors = dict[str, Tensor]


def seal(document: Document, tensors: Tensors) -> bytearray:
    """The file's bytes. ``tensors`` share no memory."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    metadata = {"cnncomp": str(FORMAT_VERSION), "model": text}
    plain = safetensors.torch.save(tensors, metadata)
    packed = _compressed(plain)
    if packed is not None:
        tensors = {"zlib": torch.from_numpy(np.frombuffer(bytearray(packed), dtype=np.uint8))}
        metadata = {"cnncomp": str(FORMAT_VERSION), "size": str(len(plain))}
    data = bytearray(safetensors.torch.save(tensors, {**metadata, "sha256": "0" * 64}))
    found = _DIGEST.search(data, 0, _header_end(data))
    assert found is not None
    data[found.start(1) : found.end(1)] = hashlib.sha256(data).hexdigest().encode()
    return data


def _compressed(plain: bytes) -> bytes | None:
    """``plain`` by zlib; None where that saves too little. Of a large file a sixteenth is tried first: floats would take
    seconds for nothing."""
    sample = b"".join(plain[begin : begin + PIECE] for begin in range(0, len(plain), 16 * PIECE))
    for part in (sample, plain):
        packed = zlib.compress(part)
        if len(packed) >= PACKED_BELOW * len(part):
            return None
    return packed


def unpack(data: bytes) -> bytes:
    """The plain form of a file, in which :func:`contents` finds everything: ``data`` itself if it is not compressed. Checks
    format, version and checksum.

    Raises:
        ValueError: with what is wrong; also RecursionError and whatever safetensors raises for a forged file.
    """
    header = _header(data)
    _verify(data)
    metadata = header["__metadata__"]
    if "size" not in metadata:
        return data
    if "zlib" not in header:
        raise ValueError("damaged: it has no tensor 'zlib'")
    begin, end = (_header_end(data) + int(offset) for offset in header["zlib"]["data_offsets"])
    return _decompressed(memoryview(data)[begin:end], int(metadata["size"]))


def contents(plain: bytes) -> tuple[Document, Tensors]:
    """Document and tensors of what :func:`unpack` gave.

    Raises:
        ValueError: with what is wrong; also RecursionError and whatever safetensors raises for a forged file.
    """
    metadata = _header(plain)["__metadata__"]
    if "model" not in metadata:
        raise ValueError("damaged: it describes no model")
    return json.loads(metadata["model"]), safetensors.torch.load(plain)


def _header_end(data: bytes | bytearray) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _header(data: bytes) -> dict[str, Any]:
    """The header of safetensors, with metadata of this version; all that it tells of is there."""
    foreign = ValueError("not a file that cnncomp.save wrote")
    end = _header_end(data)
    if len(data) < 9 or not data[8:].startswith(b"{"):
        raise foreign
    if end > len(data):
        raise ValueError(f"truncated: {len(data)} bytes, but its header alone takes {end}")
    try:
        header: dict[str, Any] = json.loads(data[8:end])
        version = int(header["__metadata__"]["cnncomp"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise foreign from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"format version {version}; this cnncomp ({__version__}) reads version {FORMAT_VERSION}: "
            + ("upgrade cnncomp" if version > FORMAT_VERSION else "not a version that ever was")
        )
    end += max((int(t["data_offsets"][1]) for name, t in header.items() if name != "__metadata__"), default=0)
    if len(data) < end:
        raise ValueError(f"truncated: {len(data)} bytes of {end}")
    return header


def _verify(data: bytes) -> None:
    """Raise ValueError unless the checksum is right."""
    found = _DIGEST.search(data, 0, _header_end(data))
    if found is None:
        raise ValueError("damaged: it has no checksum")
    digest = hashlib.sha256(data[: found.start(1)])
    digest.update(b"0" * 64)
    digest.update(memoryview(data)[found.end(1) :])
    if digest.hexdigest().encode() != found[1]:
        raise ValueError("damaged: its checksum does not match its contents")


def _decompressed(packed: memoryview, size: int) -> bytes:
    """Never makes more than ``size`` bytes, give or take a piece: a forged stream can't fill the memory beyond what its file
    says. Piece by piece, since zlib would hold everything twice."""
    engine, out = zlib.decompressobj(), io.BytesIO()
    try:
        for begin in range(0, len(packed), PIECE):
            rest: bytes | memoryview = packed[begin : begin + PIECE]
            while rest and not engine.eof and out.tell() <= size:
                out.write(engine.decompress(rest, PIECE))
                rest = engine.unconsumed_tail
    except zlib.error as error:
        raise ValueError(f"damaged: {error}") from error
    if not engine.eof or out.tell() != size:
        raise ValueError(f"damaged: what it holds does not unpack to {size} bytes")
    return out.getvalue()
