"""Plans the rows of the demo's metadata: mostly good images, plus every failure of the web."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from sdtrain.demo.images import COLORS, SEEN_PAIRS, Scene, caption, draw, random_scene
from sdtrain.errors import UserError

HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5")
REFUSING_HOST = "127.0.0.6"
MIN_ROWS = 60

# Share of each kind of row; "ok" takes the rest, about three quarters.
SHARES: dict[str, float] = {
    "not_found": 0.030,  # 404
    "forbidden": 0.015,  # 403
    "server_error": 0.005,  # 500 every time
    "flaky": 0.015,  # 500 once, then the image
    "redirect": 0.015,  # 302 to the image
    "redirect_loop": 0.003,
    "hang": 0.002,  # no answer; few, as each costs the client its whole timeout
    "truncated": 0.008,  # fewer bytes than Content-Length says
    "html": 0.010,  # 200, but a web page
    "robots": 0.004,  # X-Robots-Tag: noai
    "bad_certificate": 0.002,  # https at a host that the certificate does not cover
    "refused": 0.005,
    "file_url": 0.001,
    "data_url": 0.001,
    "small_picture": 0.010,  # smaller than its row says
    "small_row": 0.025,  # small, and the row says so
    "watermarked": 0.025,
    "spoiled": 0.030,  # low aesthetic score
    "null_scores": 0.010,
    "exact_duplicate": 0.012,  # the same bytes under another URL
    "near_duplicate": 0.012,  # recompressed and slightly larger
    "no_caption": 0.008,
}
# Concentrated on one host, so that "which hosts fail most?" has an answer.
_FAILING = {"not_found", "forbidden", "server_error", "hang", "truncated", "html"}
_FAILING_HOST = HOSTS[3]
_WITHOUT_PICTURE = _FAILING - {"truncated"} | {"redirect_loop", "refused", "file_url", "data_url"}
# The server just sends the image.
_PLAIN = {"ok", "small_picture", "small_row", "watermarked", "spoiled", "null_scores", "no_caption"}
_SERVED_AS_PICTURE = _PLAIN | {"exact_duplicate", "near_duplicate", "bad_certificate"}
_USELESS = ("IMG_{number:04d}.jpg", "DSC0{number:04d}", "image", "Click to enlarge", "ein Bild in {color}")
_GERMAN = dict(zip(COLORS, ("Rot", "Gelb", "Grün", "Türkis", "Blau", "Rosa"), strict=True))
_FOLDERS = ("photos", "wp-content/uploads", "products/large", "img/gallery")


@dataclass(frozen=True)
class Row:
    """One metadata row, and the image behind it.

    Attributes:
        url: set if it does not consist of scheme, host and path.
        size_px, listed_px: (width, height) of the actual image, and as the row claims.
        file: the image's, None if none is ever sent.
        source: for copies, the index of the original row.
    """

    index: int
    kind: str
    scene: Scene
    text: str | None
    size_px: tuple[int, int]
    listed_px: tuple[int, int]
    scheme: str
    host: str
    path: str
    file: str | None
    extension: str
    similarity: float
    pwatermark: float | None
    punsafe: float
    aesthetic: float | None
    source: int | None = None
    url: str | None = None

    @property
    def does(self) -> str:
        """The server's response to the row's path; see `sdtrain.demo.pages`."""
        return "picture" if self.kind in _SERVED_AS_PICTURE else self.kind


def plan_rows(num_rows: int, seed: int, useless: float = 0.0) -> list[Row]:
    """The rows of a world, a pure function of its arguments; pairs of `UNSEEN_PAIRS` never occur.

    The share `useless` of rows has an alt text that says nothing of the image, as on much of the web. UserError if
    there are too few rows for one of each kind.
    """
    if num_rows < MIN_ROWS:
        raise UserError(
            f"A world of {num_rows} rows is too small for one row of each kind; ask for {MIN_ROWS} or more."
        )
    counts = {kind: max(1, round(share * num_rows)) for kind, share in SHARES.items()}
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    kinds += ["ok"] * (num_rows - len(kinds))
    rng = np.random.default_rng(seed)
    kinds = [kinds[i] for i in rng.permutation(num_rows)]
    rows = [_plan_row(index, kind, np.random.default_rng((seed, index))) for index, kind in enumerate(kinds)]
    originals = iter(rng.permutation([row.index for row in rows if row.kind == "ok"]))
    for row in rows:
        if row.kind.endswith("_duplicate"):
            rows[row.index] = _copy_of(rows[int(next(originals))], row, np.random.default_rng((seed, row.index, 1)))
    return [_maybe_useless(row, np.random.default_rng((seed, row.index, 2)), useless) for row in rows]


def _maybe_useless(row: Row, rng: np.random.Generator, share: float) -> Row:
    if row.text is None or rng.random() >= share:
        return row
    text = str(rng.choice(_USELESS)).format(number=row.index, color=_GERMAN[row.scene.color])
    return replace(row, text=text)


def _plan_row(index: int, kind: str, rng: np.random.Generator) -> Row:
    scene = random_scene(rng, *SEEN_PAIRS[index % len(SEEN_PAIRS)])
    width, height = (int(v) for v in rng.integers(512, 769, 2))
    extension = str(rng.choice(("jpg", "png", "webp"), p=(0.80, 0.12, 0.08)))
    slug = f"{scene.color}-{scene.shape}-{index:05d}.{extension}"
    row = Row(
        index=index,
        kind=kind,
        scene=scene,
        text=caption(scene, rng),
        size_px=(width, height),
        listed_px=(width, height),
        scheme="http" if index % 2 else "https",
        host=_FAILING_HOST if kind in _FAILING and rng.random() < 0.6 else str(rng.choice(HOSTS)),
        path=f"/{_FOLDERS[int(rng.integers(len(_FOLDERS)))]}/{slug}",
        file=None if kind in _WITHOUT_PICTURE else f"{index:05d}.{extension}",
        extension=extension,
        similarity=float(np.clip(rng.normal(0.325, 0.025), 0.28, 0.45)),
        pwatermark=0.49 * rng.beta(1.2, 6),
        punsafe=rng.beta(1, 30),
        aesthetic=5.01 + 2.49 * rng.beta(1.5, 4),
    )
    return _PARTICULARS[kind](row, rng) if kind in _PARTICULARS else row


def _small_image(row: Row, rng: np.random.Generator) -> Row:
    width, height = (int(v) for v in rng.integers(256, 481, 2))
    return replace(row, size_px=(width, height))


def _small_row(row: Row, rng: np.random.Generator) -> Row:
    size_px = (int(rng.integers(200, 512)), int(rng.integers(200, 640)))
    return replace(row, size_px=size_px, listed_px=size_px)


def _null_scores(row: Row, rng: np.random.Generator) -> Row:
    which = rng.integers(3)
    return replace(
        row,
        pwatermark=None if which != 0 else row.pwatermark,
        aesthetic=None if which != 1 else row.aesthetic,
    )


def _data_url(row: Row, rng: np.random.Generator) -> Row:
    buffer = io.BytesIO()
    draw(row.scene, 512, 512).save(buffer, "jpeg", quality=20)
    return replace(row, url="data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())


_PARTICULARS: dict[str, Callable[[Row, np.random.Generator], Row]] = {
    "small_picture": _small_image,
    "small_row": _small_row,
    "null_scores": _null_scores,
    "data_url": _data_url,
    "file_url": lambda row, rng: replace(row, url="file:///etc/hostname"),
    "watermarked": lambda row, rng: replace(row, pwatermark=float(rng.uniform(0.6, 0.98))),
    "spoiled": lambda row, rng: replace(row, aesthetic=float(rng.uniform(2.0, 4.95))),
    "no_caption": lambda row, rng: replace(row, text=None),
    "refused": lambda row, rng: replace(row, host=REFUSING_HOST),
    "bad_certificate": lambda row, rng: replace(row, scheme="https", host="localhost"),
}


def _copy_of(original: Row, row: Row, rng: np.random.Generator) -> Row:
    """`row` as a copy of `original`: same scene, other URL and caption."""
    width, height = original.size_px
    file, extension = original.file, original.extension
    if row.kind == "near_duplicate":
        scale, extension = float(rng.uniform(1.02, 1.06)), "jpg"
        width, height = round(width * scale), round(height * scale)
        file = f"{row.index:05d}.{extension}"
    return replace(
        row,
        scene=original.scene,
        text=caption(original.scene, rng),
        size_px=(width, height),
        listed_px=(width, height),
        path=f"/mirror/{original.scene.color}-{original.scene.shape}-{row.index:05d}.{extension}",
        file=file,
        extension=extension,
        source=original.index,
    )
