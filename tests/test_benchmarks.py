"""The scripts of benchmarks/ load: what they import from each other and from the library is there."""
import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'
SCRIPTS = sorted(file.stem for file in BENCHMARKS.glob('*.py'))
OWN = {path.stem for path in BENCHMARKS.iterdir()} | {'timm_evo'}


@pytest.fixture
def path_of_scripts(monkeypatch):
    """As when a script is run. Their modules leave again, because `common` or `speed` may be the name of anything."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in [name for name in sys.modules if name.partition('.')[0] in OWN - {'timm_evo'}]:
        del sys.modules[name]


@pytest.mark.usefixtures('path_of_scripts')
@pytest.mark.parametrize('script', SCRIPTS)
def test_a_script_loads(script):
    try:
        importlib.import_module(script)
    except ModuleNotFoundError as error:
        assert error.name is not None
        if error.name.partition('.')[0] in OWN:
            raise
        pytest.skip(f'{error.name} is not installed')
