"""Sheets of images with a line or two below each, as PNG or as one HTML file."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib
from PIL import Image, ImageDraw, ImageFont

from sdtrain.dataset.files import publish
from sdtrain.errors import UserError

PAGES = Path(__file__).parent / "pages"
_SIDE, _GAP, _LINE, _NUM_LINES, _TITLE, _COLUMNS = 192, 16, 14, 4, 28, 6
_INK, _MUTED, _FLAG = "#24292f", "#6e7781", "#d1495b"


@dataclass(frozen=True)
class Cell:
    """One image (None if lost) with highlighted `head`, like a score, and `text` below; `marked` frames it in red."""

    image: Image.Image | None
    head: str
    text: str = ""
    marked: bool = False


@dataclass(frozen=True)
class Row:
    """Images that belong together."""

    title: str
    cells: Sequence[Cell]


def write_sheet(path: Path, title: str, notes: Sequence[str], rows: Sequence[Row]) -> None:
    """Writes a sheet as HTML or PNG, by the file's suffix; raises `UserError` for any other."""
    if path.suffix == ".html":
        with publish(path) as temporary:
            temporary.write_text(_page(title, notes, rows), encoding="utf-8")
    elif path.suffix == ".png":
        image = _draw(title, notes, rows)
        with publish(path) as temporary:
            image.save(temporary, "PNG")
    else:
        raise UserError(f"What should {path} hold? A sheet of images ends in .png or .html.")


def environment() -> jinja2.Environment:
    """Returns the page templates' environment, which escapes all values."""
    return jinja2.Environment(loader=jinja2.FileSystemLoader(PAGES), autoescape=True, trim_blocks=True)


def small(image: Image.Image, side: int = _SIDE) -> Image.Image:
    """Returns a copy that fits a square."""
    scale = side / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def _page(title: str, notes: Sequence[str], rows: Sequence[Row]) -> str:
    shown = [(row.title, [(_data_url(cell.image), cell) for cell in row.cells]) for row in rows]
    style = (PAGES / "search.css").read_text()
    return environment().get_template("sheet.html").render(title=title, notes=notes, rows=shown, style=style)


def _data_url(image: Image.Image | None) -> str:
    if image is None:
        return ""
    buffer = io.BytesIO()
    small(image, 2 * _SIDE).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _draw(title: str, notes: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    lines = [Row(row.title if first == 0 else "", row.cells[first : first + _COLUMNS])
             for row in rows for first in range(0, max(1, len(row.cells)), _COLUMNS)]  # fmt: skip
    columns = max([len(row.cells) for row in lines], default=1)
    width = max(_GAP + columns * (_SIDE + _GAP), 640)
    notes = [line for note in notes for line in textwrap.wrap(note, width // 7)]
    head = _GAP + _TITLE + _LINE * len(notes) + _GAP
    heights = [(_TITLE if row.title else 0) + _SIDE + _LINE * (_NUM_LINES + 1) + _GAP for row in lines]
    sheet = Image.new("RGB", (width, head + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP), title, _INK, _font(18, bold=True))
    for number, note in enumerate(notes):
        pen.text((_GAP, _GAP + _TITLE + number * _LINE), note, _MUTED, _font(11))
    top = head
    for row, height in zip(lines, heights, strict=True):
        if row.title:
            pen.text((_GAP, top), textwrap.shorten(row.title, width // 8), _INK, _font(12, bold=True))
        for place, cell in enumerate(row.cells):
            _draw_cell(sheet, pen, cell, _GAP + place * (_SIDE + _GAP), top + (_TITLE if row.title else 0))
        top += height
    return sheet


def _draw_cell(sheet: Image.Image, pen: ImageDraw.ImageDraw, cell: Cell, left: int, top: int) -> None:
    box = (left - 3, top - 3, left + _SIDE + 2, top + _SIDE + 2)
    pen.rectangle(box, "#f6f8fa", _FLAG if cell.marked else "#d0d7de", 3 if cell.marked else 1)
    if cell.image is None:
        pen.text((left + 8, top + 8), "no image", _MUTED, _font(11))
    else:
        fitted = small(cell.image)
        sheet.paste(fitted, (left + (_SIDE - fitted.width) // 2, top + (_SIDE - fitted.height) // 2))
    pen.text((left, top + _SIDE + 6), cell.head, _FLAG if cell.marked else _INK, _font(11, bold=True))
    for number, line in enumerate(textwrap.wrap(cell.text, 28, max_lines=_NUM_LINES - 1, placeholder=" …"), 1):
        pen.text((left, top + _SIDE + 6 + number * _LINE), line, _MUTED, _font(10))


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # Matplotlib's own font: Pillow's has Latin letters only, and captions have all.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
