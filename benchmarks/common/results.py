""" Files in `results/`, and the images of a benchmark """
import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .environment import describe_environment, summarise_environment

if TYPE_CHECKING:  # not every command needs matplotlib
    from matplotlib.figure import Figure

SUFFIXES = ('.json', '.md', '.png')


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write to, which replaces `path` when it is complete."""
    part = path.with_name(f'.{path.stem}.part{path.suffix}')
    yield part
    os.replace(part, path)


def results_prefix(text: str) -> Path:
    """Path of the results without suffixes, as an argument of a command."""
    path = Path(text)
    if path.suffix in SUFFIXES or not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(
            f'{text!r} is not the path of files in an existing folder, without {", ".join(SUFFIXES)}')
    return path


def add_results(parser: argparse.ArgumentParser, suffixes: Sequence[str] = SUFFIXES) -> None:
    parser.add_argument(
        '--results',
        type=results_prefix,
        required=True,
        metavar='PREFIX',
        help=f'write {", ".join(f"PREFIX{suffix}" for suffix in suffixes)}',
    )


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Lines of a table, the first column left-aligned."""
    lines = [header, ['---', *['---:'] * (len(header) - 1)], *rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def write_json(prefix: Path, record: dict) -> None:
    """Write PREFIX.json, which is replaced only when it is complete."""
    with replacing(prefix.with_name(prefix.name + '.json')) as part:
        part.write_text(json.dumps(record, indent=2) + '\n')


def read_records(prefix: Path, described: dict) -> dict[str, dict]:
    """The settings in PREFIX.json, which the same command continues; none if there is no such file.

    Args:
        prefix: Path without suffixes.
        described: What else is in the file. What was measured otherwise is an error, but for date and command.
    """
    file = prefix.with_name(prefix.name + '.json')
    if not file.exists():
        return {}
    before = json.loads(file.read_text())
    for key, value in described.items():
        if key not in ('date', 'command') and before.get(key) != value:
            raise SystemExit(
                f'--results: {file} was measured with another {key}: {before.get(key)}, now {value}. '
                'Use another PREFIX.')
    return before['settings']


def write_results(
        prefix: Path,
        title: str,
        table: str,
        record: dict,
        figure: 'Figure',
        environment: dict | None = None,
) -> str:
    """Write JSON, table and plot, and return the table with its title and a line about the environment.

    Args:
        prefix: Path without suffixes.
        title: Title of table and plot.
        table: Markdown.
        record: Content of the JSON file without the environment. Its `settings` have `device`, `dtype`, `batch_size`
            (one or several), `rounds`, and optionally `autocast`.
        figure: The plot.
        environment: Result of `describe_environment` during the measurement; None for the current one.
    """
    settings = record['settings']
    environment = environment or describe_environment(torch.device(settings['device']))
    dtype = f'autocast to {settings["autocast"]}' if settings.get('autocast') else settings['dtype']
    batch_sizes = settings['batch_size'] if isinstance(settings['batch_size'], list) else [settings['batch_size']]
    speed = f'speed: {dtype}, batch {" and ".join(map(str, batch_sizes))}, median of {settings["rounds"]} rounds'
    text = f'{title}\n\n{table}\n{summarise_environment(environment)}; {speed}.\n'
    write_json(prefix, {**environment, **record})
    with replacing(prefix.with_name(prefix.name + '.md')) as part:
        part.write_text(text)
    with replacing(prefix.with_name(prefix.name + '.png')) as part:
        figure.savefig(part, dpi=120)
    return text


def find_validation_split(data_dir: Path) -> str:
    """The folder of validation images. Without this check, timm would use all images of `data_dir` if there is none."""
    if not (data_dir / 'train').is_dir():
        raise SystemExit(f'--data-dir: there is no folder train in {data_dir}')
    for split in ('validation', 'val', 'test'):
        if (data_dir / split).is_dir():
            return split
    raise SystemExit(f'--data-dir: there is no folder validation, val or test in {data_dir}')
