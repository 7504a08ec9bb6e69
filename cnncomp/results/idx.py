"""Fashion-MNIST (Xiao et al., 2017) from its IDX files, as the Debian package dataset-fashion-mnist installs them."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cnncomp.errors import ArgumentError, FileFormatError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@dataclass(frozen=True)
class ImageSet:
    """Images (N, 1, H, W) uint8, labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> ImageSet:
        return ImageSet(self.images[index], self.labels[index])


@dataclass(frozen=True)
class FashionMnist:
    """55,000 images to train on, 5,000 held out of the training set to choose with, and 10,000 to score at the end."""

    train: ImageSet
    held_out: ImageSet
    test: ImageSet


def read_idx(path: Path) -> Tensor:
    """The uint8 array of an IDX file, gzipped or not: two zero bytes, type 8, the number of dimensions, their sizes as
    big-endian int32, then the values in row-major order.

    Raises:
        FileFormatError: it is something else.
    """
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError) as error:
            raise FileFormatError(f"{path} is damaged: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise FileFormatError(f"{path} is no IDX file of bytes")
    start = 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if len(raw) - start != math.prod(shape):
        raise FileFormatError(f"{path} holds {len(raw) - start} values, but says {'×'.join(map(str, shape))}")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=start).reshape(shape)


def fashion_mnist(folder: str | Path | None = None, held_out: int = 5000) -> FashionMnist:
    """Read the four files, as ``*.gz`` or unpacked.

    Args:
        folder: Where they are; by default where the Debian package puts them.
        held_out: Images taken out of the training set, the last ones of it.

    Raises:
        ArgumentError: The folder lacks one of them.
        FileFormatError: One of them is damaged.
    """
    root = DEBIAN if folder is None else Path(folder)

    def read(kind: str) -> ImageSet:
        parts = []
        for suffix in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            paths = [root / f"{kind}-{suffix}{ending}" for ending in (".gz", "")]
            path = next((p for p in paths if p.is_file()), None)
            if path is None:
                expected = f"{paths[0].name} in it (Debian: apt install dataset-fashion-mnist)"
                raise ArgumentError("folder", repr(str(root)), expected)
            parts.append(read_idx(path))
        images, labels = parts
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            got = f"images {tuple(images.shape)} and labels {tuple(labels.shape)}"
            raise FileFormatError(f"{root}: {kind} holds {got}")
        return ImageSet(images.unsqueeze(1), labels.long())

    full = read("train")
    return FashionMnist(full[: len(full) - held_out], full[len(full) - held_out :], read("t10k"))
