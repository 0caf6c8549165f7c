""" What was measured, kept in a file as it comes, so that tuning goes on where it was interrupted """
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ['Notes', 'fingerprint']


class Notes:
    """Results by name, of one kind of measurement.

    Args:
        file: Where they are kept; None for memory alone.
        identity: All that they depend on. Notes in the file that depend on anything else are not read.
    """

    def __init__(self, file: Path | None, identity: dict[str, Any]) -> None:
        self._file = file
        self._content: dict[str, Any] = {'identity': identity, 'results': {}}
        if file is not None and file.exists():
            try:
                content = json.loads(file.read_text(encoding='utf-8'))
            except ValueError as error:
                raise ValueError(f'{file} is no JSON, delete it or save under another name: {error}') from error
            if isinstance(content, dict) and content.get('identity') == json.loads(json.dumps(identity)):
                self._content = content

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The result of that name, measured if it is not known yet; as it comes out of JSON, each time."""
        results = self._content['results']
        if name not in results:
            results[name] = json.loads(json.dumps(measure()))
            self._write()
        return results[name]

    def _write(self) -> None:
        if self._file is None:
            return
        part = self._file.with_name(self._file.name + '.part')
        part.write_text(json.dumps(self._content, indent=1) + '\n', encoding='utf-8')
        os.replace(part, self._file)


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A text that differs where tensors differ."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(flat.view(dtype=torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
