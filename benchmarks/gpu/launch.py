""" Run a script of timm with the evolved models registered, also if this package is not installed

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
    sys.path.insert(0, str(script.parent))  # as for a script that is called directly
    runpy.run_path(str(script), run_name='__main__')


if __name__ == '__main__':
    main()
