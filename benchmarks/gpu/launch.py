""" Runs a script of timm's with the evolved models registered, also where this package is not installed

    python -m gpu.launch train.py --model evo_deit_tiny_patch16_224 ...
"""
import runpy
import sys
from pathlib import Path

import timm  # noqa: F401

from timm_evo.models import registry  # noqa: F401


def main() -> None:
    script = Path(sys.argv[1]).resolve()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.parent))  # as if it had been called by its name
    runpy.run_path(str(script), run_name='__main__')


if __name__ == '__main__':
    main()
