"""Write a split of four small synthetic scenes."""

from pathlib import Path

from convert.shapes import iter_samples
from convert.write import write_split


def write_scenes(folder: Path) -> str:
    """Write the split `train`; return the folder."""
    write_split(iter_samples(num_samples=4, seed=11, image_size=84), str(folder), "train")
    return str(folder)
