""" Results without a plot: a JSON file and a text beside it """
import json
from pathlib import Path

from _results import replacing


def write_report(prefix: Path, text: str, record: dict) -> None:
    """Write PREFIX.json and PREFIX.md, each as a whole."""
    with replacing(prefix.with_name(prefix.name + '.json')) as part:
        part.write_text(json.dumps(record, indent=2) + '\n')
    with replacing(prefix.with_name(prefix.name + '.md')) as part:
        part.write_text(text)
