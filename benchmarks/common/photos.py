"""Photos of a folder, and on which of them something was chosen

Of https://github.com/EliSchwartz/imagenet-sample-images, in the order of their names.
"""
from pathlib import Path

__all__ = ['REPORTED', 'TUNED', 'list_photos', 'reported_photos', 'spread']

# Of every 20 photos: those that nothing was chosen on, and those that schedules are tuned on. The rule of selection by
# similarity was chosen on some of the others.
REPORTED = frozenset([1, 2, 5, 6, 9, 17, 18])
TUNED = frozenset([0, 4, 8, 12])


def list_photos(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in ('.jpeg', '.jpg', '.png'))
    if len(files) < 20:
        raise SystemExit(f'--photos: there are only {len(files)} photos in {folder}, at least 20 are needed')
    return files


def reported_photos(folder: Path, number: int | None) -> list[Path]:
    """Photos that nothing was chosen on, all of them or an evenly spread number."""
    return spread([file for i, file in enumerate(list_photos(folder)) if i % 20 in REPORTED], number)


def spread(items: list, number: int | None) -> list:
    """Evenly spread ones of a list, or all."""
    if number is None:
        return items
    if number > len(items):
        raise SystemExit(f'--num-images {number}: there are only {len(items)}')
    return [items[i * len(items) // number] for i in range(number)]
