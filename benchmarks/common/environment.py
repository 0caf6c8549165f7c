""" The environment of a measurement, for the files in `results/` """
import hashlib
import os
import platform
import re
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path

import timm
import torch

import timm_evo


def describe_environment(device: torch.device | None = None) -> dict:
    """Machine, versions, date and command line, without host name and paths.

    Args:
        device: Device that models ran on, if any.
    """
    machine = {
        'processor': _processor(),
        'cores': os.cpu_count(),
        'instructions': torch.backends.cpu.get_cpu_capability(),  # virtual machines hide the processor's model
    }
    if device is not None:
        machine['threads'] = torch.get_num_threads()
        if device.type == 'cuda':
            machine['gpu'] = torch.cuda.get_device_name(device)
    return {
        'date': datetime.now(timezone.utc).isoformat(timespec='seconds'),
        'command': _command_line(),
        'machine': machine,
        'versions': {
            'python': platform.python_version(),
            'torch': torch.__version__,
            'timm': timm.__version__,
            'timm_evo': timm_evo.__version__,
        },
    }


def summarise_environment(environment: dict) -> str:
    """The machine, versions and date of `describe_environment` in one line."""
    machine, versions = environment['machine'], environment['versions']
    where = machine.get('gpu') or f'{machine["processor"]}, {machine["threads"]} threads'
    return f'{where}, torch {versions["torch"]}, timm {versions["timm"]}, {environment["date"][:10]}'


def library_fingerprint() -> str:
    """A hash that changes with the code of timm_evo, unlike its version."""
    digest = hashlib.sha256()
    folder = Path(timm_evo.__file__).parent
    for file in sorted(folder.rglob('*.py')):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _command_line() -> str:
    # of an absolute path, alone or after `--option=`, only the last part is kept
    args = [re.sub(r'(^|=)/.*/', r'\1', arg) for arg in sys.argv[1:]]
    return shlex.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *args])


def _processor() -> str:
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.exists():
        match = re.search(r'^model name\s*:\s*(.+)$', cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1]
    return platform.processor() or platform.machine()
