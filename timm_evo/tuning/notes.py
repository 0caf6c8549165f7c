""" A file of measurements, with which tuning continues after an interruption """
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import reason

__all__ = ['Notes', 'fingerprint']


class Notes:
    """Measurements by name.

    Args:
        file: File of the measurements; None to keep them only in memory.
        identity: Everything that the measurements depend on. A file with another identity is not read.
    """

    def __init__(self, file: Path | None, identity: dict[str, Any]) -> None:
        self._file = file
        self._content: dict[str, Any] = {'identity': identity, 'results': {}}
        if file is not None and file.exists():
            try:
                content = json.loads(file.read_text(encoding='utf-8'))
            except ValueError as error:
                raise ValueError(
                    f'{file} is not JSON. Delete it, or save under another name. {reason(error)}') from error
            if isinstance(content, dict) and content.get('identity') == json.loads(json.dumps(identity)):
                self._content = content

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The result of this name, which is measured if it is not known. It is always as JSON returns it."""
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
    """A text that is different for different tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(flat.view(dtype=torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
