"""Where the parts of a drawn sheet go: pictures in rows and columns, words and patterns in rows."""

from collections.abc import Sequence

from PIL import Image

PAPER = (24, 26, 30)


def grid(pictures: Sequence[Image.Image], columns: int, gap: int) -> Image.Image:
    """Lays pictures out in rows, each column as wide as its widest picture and each row as high as its highest.

    Raises:
        ValueError: There is nothing to lay out, or no column.
    """
    if not pictures or columns < 1:
        raise ValueError(f"cannot lay out {len(pictures)} pictures in {columns} columns: both must be at least 1")
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    widths = [max(row[column].width for row in rows if column < len(row)) for column in range(len(rows[0]))]
    heights = [max(picture.height for picture in row) for row in rows]
    size = sum(widths) + gap * (len(widths) - 1), sum(heights) + gap * (len(heights) - 1)
    sheet = Image.new("RGB", size, PAPER)
    y = 0
    for row, height in zip(rows, heights, strict=True):
        x = 0
        for picture, width in zip(row, widths, strict=False):
            sheet.paste(picture, (x, y))
            x += width + gap
        y += height + gap
    return sheet


def best_columns(number: int, size: tuple[int, int], aspect: float) -> int:
    """In how many columns `number` pictures of `size` become largest on a sheet of `aspect` (width over height)."""

    def scale(columns: int) -> float:
        return min(aspect / (columns * size[0]), 1 / (-(-number // columns) * size[1]))

    return max(range(1, number + 1), key=scale)


def flow(widths: Sequence[float], room: float, gap: float) -> list[tuple[float, int]]:
    """(x, row) of things side by side, as many in a row as `room` holds, at least one."""
    places: list[tuple[float, int]] = []
    x, row = 0.0, 0
    for width in widths:
        if x > 0 and x + width > room:
            x, row = 0.0, row + 1
        places.append((x, row))
        x += width + gap
    return places
