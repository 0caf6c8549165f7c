""" Results without a plot: a JSON file and a text """
from pathlib import Path

from .results import replacing, write_json


def write_report(prefix: Path, text: str, record: dict) -> None:
    """Write PREFIX.json and PREFIX.md. Each is replaced only when it is complete."""
    write_json(prefix, record)
    with replacing(prefix.with_name(prefix.name + '.md')) as part:
        part.write_text(text)
