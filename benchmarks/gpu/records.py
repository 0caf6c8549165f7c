""" Records of measurements, one line of JSON each, so that they are kept if a run is killed """
import json
import os
from pathlib import Path

from .settings import Setting, identity

SAME = ('device', 'versions', 'library', 'has_kernels')  # figures of two runs with the same values are comparable


def append(file: Path, record: dict) -> None:
    """Add a record and wait until it is on disk. Several processes may write to one file."""
    with file.open('a') as stream:
        stream.write(json.dumps(record) + '\n')
        stream.flush()
        os.fsync(stream.fileno())


def read(file: Path) -> list[dict]:
    """All records, without an incomplete last line."""
    records = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def end_last_line(file: Path) -> None:
    """End an incomplete last line, so that the next record begins a new line."""
    if file.exists() and not file.read_bytes().endswith(b'\n'):
        with file.open('a') as stream:
            stream.write('\n')


def comparable(records: list[dict], run: dict) -> list[dict]:
    """Records of runs on the same device, with the same versions and the same state of the library."""
    runs = {
        record['run'] for record in records
        if record['kind'] == 'run' and all(record[key] == run[key] for key in SAME)}
    return [record for record in records if record['run'] in runs]


def missing(setting: Setting, records: list[dict]) -> tuple[str, ...]:
    """Variants that are not timed yet. If there are any, the dense one is added."""
    done = {
        record['variant'] for record in records
        if record['kind'] == 'speed' and identity(record) == identity(setting.where())}
    return setting.variants[:1] * (not done.issuperset(setting.variants)) + tuple(
        name for name in setting.variants[1:] if name not in done)
