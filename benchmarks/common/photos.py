"""Photos of a folder, and on which of them nothing was chosen

Of https://github.com/EliSchwartz/imagenet-sample-images, in the order of their names.
"""
from pathlib import Path

__all__ = ['REPORTED', 'TUNED', 'list_photos', 'reported_photos', 'spread']

# indices in every 20 photos: photos on which nothing was chosen, and photos on which schedules are tuned; the rule of
# selection by similarity was chosen on some of the others
REPORTED = frozenset([1, 2, 5, 6, 9, 17, 18])
TUNED = frozenset([0, 4, 8, 12])


def list_photos(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in ('.jpeg', '.jpg', '.png'))
    if len(files) < 20:
        raise SystemExit(f'--photos: there are {len(files)} photos in {folder}. There must be at least 20.')
    return files


def reported_photos(folder: Path, number: int | None) -> list[Path]:
    """Photos on which nothing was chosen, all of them or an evenly spread number."""
    return spread([file for i, file in enumerate(list_photos(folder)) if i % 20 in REPORTED], number)


def spread(items: list, number: int | None) -> list:
    """Evenly spread items of a list, or all."""
    if number is None:
        return items
    if number > len(items):
        raise SystemExit(f'--num-images {number} is not allowed. There are only {len(items)}.')
    return [items[i * len(items) // number] for i in range(number)]
