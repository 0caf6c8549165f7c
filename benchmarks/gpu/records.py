""" What was measured, a line of JSON each, which stays when a run is killed """
import json
import os
from pathlib import Path

from .settings import Setting, identity

SAME = ('device', 'versions', 'library', 'has_kernels')  # what makes figures of two runs comparable


def append(file: Path, record: dict) -> None:
    """Add a record, on disk when this returns; several processes may write to one file."""
    with file.open('a') as stream:
        stream.write(json.dumps(record) + '\n')
        stream.flush()
        os.fsync(stream.fileno())


def read(file: Path) -> list[dict]:
    """All records, without a last line that was not finished."""
    records = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def end_last_line(file: Path) -> None:
    """So that a record does not go on where another was cut off."""
    if file.exists() and not file.read_bytes().endswith(b'\n'):
        with file.open('a') as stream:
            stream.write('\n')


def comparable(records: list[dict], run: dict) -> list[dict]:
    """Those that runs on such a device, with these versions and this state of the library, have written."""
    runs = {
        record['run'] for record in records
        if record['kind'] == 'run' and all(record[key] == run[key] for key in SAME)}
    return [record for record in records if record['run'] in runs]


def missing(setting: Setting, records: list[dict]) -> tuple[str, ...]:
    """Variants that are still to be timed, with the dense one to compare them with, if there are any."""
    done = {
        record['variant'] for record in records
        if record['kind'] == 'speed' and identity(record) == identity(setting.where())}
    return setting.variants[:1] * (not done.issuperset(setting.variants)) + tuple(
        name for name in setting.variants[1:] if name not in done)
