"""The models are there wherever timm is: no import, no warning, and no harm when something goes wrong.

Every case is a fresh process, because registration happens once in a process.
"""
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import yaml

from timm_evo.models.registry import TIMM_MIN_VERSION

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
SOME_NAMES = [
    'evo_deit_base_distilled_patch16_224',
    'evo_deit_base_distilled_patch16_384',
    'evo_deit_base_patch16_224',
    'evo_deit_base_patch16_384',
    'evo_deit_small_distilled_patch16_224',
    'evo_deit_small_patch16_224',
    'evo_deit_small_patch16_384',
    'evo_deit_tiny_distilled_patch16_224',
    'evo_deit_tiny_patch16_224',
    *(f'evo_levit_{size}' for size in ('128', '128s', '192', '256', '384')),
    *(f'evo_levit_cls_{size}' for size in ('128', '128s', '192', '256', '384')),
    'evo_test_vit',
    'evo_vit_base_patch16_224',
]
NAMES = timm.list_models('evo_*')  # of this process, which must be those of any other


def run(code: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh process, away from the repository."""
    return subprocess.run(
        [sys.executable, *args, '-c', code], cwd='/', env=os.environ | environment, capture_output=True, text=True)


def output(code: str, **environment: str) -> str:
    """What the code prints; no warning may come from this package."""
    result = run(code, **environment)
    assert result.returncode == 0, result.stderr
    assert 'timm-evo' not in result.stderr and 'Overwriting' not in result.stderr, result.stderr
    return result.stdout.strip()


def test_models_are_listed_after_importing_timm_alone():
    assert output('import timm; print(timm.list_models("evo_*"))') == str(NAMES)
    assert set(SOME_NAMES) <= set(NAMES)


@pytest.mark.parametrize('autoload, imports', [
    ('1', 'import timm.models.vision_transformer, timm'),
    pytest.param('1', 'import timm_evo, torch, timm, timm_evo', marks=pytest.mark.slow),
    pytest.param('1', 'from timm_evo import EvoVisionTransformer; import timm', marks=pytest.mark.slow),
    pytest.param('1', 'import timm_evo.entrypoints, timm', marks=pytest.mark.slow),
    pytest.param('0', 'import timm, timm_evo', marks=pytest.mark.slow),
    pytest.param('0', 'import timm_evo, torch, timm, timm_evo', marks=pytest.mark.slow),
    ('0', 'import timm_evo.models.vision_transformer, timm'),
])
def test_any_order_of_imports_registers_once(autoload, imports):
    code = f'{imports}; print(timm.list_models("evo_*")); timm.create_model("evo_test_vit")'
    assert output(code, TORCH_DEVICE_BACKEND_AUTOLOAD=autoload, PYTHONWARNINGS='error::UserWarning') == str(NAMES)


def outputs(codes: list[str]) -> list[str]:
    """What each prints; two run at once, importing takes seconds."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(output, codes))


STATEMENTS = [
    'import torch', 'import timm', 'import timm.models', 'import timm_evo', 'import timm_evo.entrypoints',
    'import timm_evo.hub', 'from timm_evo import evolve', 'from timm_evo import EvoLevit',
]


@pytest.mark.slow
def test_other_orders():
    orders = random.Random(0).sample(list(itertools.permutations(STATEMENTS)), 20)
    codes = ['; '.join([*order, 'timm.create_model("evo_test_vit")', 'print(len(timm.list_models("evo_*")))'])
             for order in orders]
    assert outputs(codes) == [str(len(NAMES))] * len(orders)


# Every thread starts with its own statement, when the first one, which is alone until then, looks for timm.models. That
# takes a second, in which all others come to where they wait for timm. None imports a part of timm: while another
# thread imports timm, that fails without timm-evo, too.
THREADS = """
import sys, threading, time

class SlowFinder:
    def find_spec(self, name, path=None, target=None):
        if name == 'timm.models' and not begun.is_set():
            begun.set()
            time.sleep(1)

def work(statement):
    exec(statement, {{}})
    import timm
    timm.create_model('evo_test_vit'), timm.create_model('evo_levit_128s')
    found.append(len(timm.list_models('evo_*')))

sys.meta_path.insert(0, SlowFinder())
first, *others = {statements}
begun, found = threading.Event(), []
threads = [threading.Thread(target=work, args=[statement], daemon=True) for statement in (first, *others)]
threads[0].start()
begun.wait(60)
for thread in threads[1:]:
    thread.start()
for thread in threads:
    thread.join(60)
print(found)
"""


@pytest.mark.parametrize('firsts', [
    ['import timm'],
    pytest.param(
        ['import timm_evo.entrypoints', 'import timm_evo.hub', 'from timm_evo import evolve'], marks=pytest.mark.slow),
])
def test_threads_that_import_at_once_all_see_the_models(firsts):
    others = [statement for statement in STATEMENTS if statement != 'import timm.models']
    codes = [THREADS.format(statements=[first, *others]) for first in firsts]
    assert outputs(codes) == [str([len(NAMES)] * (1 + len(others)))] * len(firsts)


def test_opting_out():
    assert output('import timm; print(timm.list_models("evo_*"))', TORCH_DEVICE_BACKEND_AUTOLOAD='0') == '[]'


def test_torch_without_timm_imports_neither_timm_nor_the_models():
    loaded = output('import torch, sys; print(sorted(m for m in sys.modules if m.startswith(("timm", "torchvision"))))')
    assert loaded == "['timm_evo']"


@pytest.mark.slow
def test_spawned_workers_of_a_data_loader(tmp_path):
    script = tmp_path / 'loader.py'
    script.write_text(
        'import timm\n'
        'from torch.utils.data import DataLoader, Dataset\n\n'
        'class Lengths(Dataset):\n'
        '    def __len__(self):\n'
        '        return 2\n\n'
        '    def __getitem__(self, index):\n'
        '        return len(timm.list_models("evo_*"))\n\n'
        'if __name__ == "__main__":\n'
        '    print(next(iter(DataLoader(Lengths(), 2, num_workers=1, multiprocessing_context="spawn"))).tolist())\n'
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.stdout.strip() == str([len(NAMES)] * 2), result.stderr


@pytest.mark.slow
def test_torchrun_workers(tmp_path):
    script = tmp_path / 'worker.py'
    script.write_text('import os, timm\nprint(os.environ["RANK"], timm.create_model("evo_test_vit").schedule.scored)\n')
    result = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(script)],
        capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r'^[01] \[False', result.stdout, flags=re.M)) == 2


# Another package has registered names that begin with evo_, too.
TAKEN = ['evo_foo', 'evo_deit_tiny_patch16_224', 'evo_deit_small_patch16_384', 'evo_levit_128s', 'evo_levit_cls_128s']
FOREIGN = f"""
import timm
from timm.models import VisionTransformer, build_model_with_cfg, register_model

def entrypoint(name):
    def create(pretrained=False, **kwargs):
        small = dict(img_size=32, embed_dim=24, depth=4, num_heads=2)
        return build_model_with_cfg(VisionTransformer, name, pretrained, **(small | kwargs))
    create.__name__ = name
    return create

default_cfgs = {{name: dict(url='', input_size=(3, 32, 32), num_classes=1000) for name in {TAKEN}}}
for name in {TAKEN}:
    register_model(entrypoint(name))
import timm_evo
from timm_evo import checkpoints, hub
from timm_evo.inspection import building, info
from timm_evo.models import registry
"""


def test_models_of_others_keep_their_names_and_are_not_taken_for_ours():
    assert output(FOREIGN + f"""
print([type(timm.create_model(name)).__name__ for name in {TAKEN}])
print([registry.is_evolved(name) for name in {TAKEN}], set(registry.default_cfgs) & set({TAKEN}))
print(registry.is_evolved('evo_levit_128'), registry.is_evolved('evo_test_vit.r160_in1k'), registry.is_evolved('vit'))
print(len(timm.list_models('evo_*')))
""", TORCH_DEVICE_BACKEND_AUTOLOAD='0').splitlines() == [
        str(['VisionTransformer'] * 5), f'{[False] * 5} set()', 'True True False', str(len(NAMES) + 1)]


def test_models_of_others_are_neither_described_nor_saved_as_ours(tmp_path):
    assert output(FOREIGN + f"""
def refused(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError) as error:
        return error

print(refused(info.summarise, 'evo_foo'))
print(refused(info.summarise, 'foo'))
print(refused(info.summarise, 'deit_tiny_patch16_224'))
print(refused(hub.save, timm.create_model('evo_foo'), '{tmp_path}/model'))
model = timm_evo.evolve(timm.create_model('evo_foo'))
print(refused(hub.save, model, '{tmp_path}/model'))
model.set_evolution(keep_ratio=0.7)
print('keep_ratio' in getattr(model, '_model_args', {{}}))
""", TORCH_DEVICE_BACKEND_AUTOLOAD='0').splitlines() == [
        'evo_foo is not an evolved model.',
        f"timm has no model foo. The {len(NAMES) - 4} evolved ones are in timm.list_models('evo_*').",
        'deit_tiny_patch16_224 is not an evolved model.',
        "VisionTransformer is not evolved. timm's save_for_hf and push_to_hf_hub write a dense model; "
        "timm.create_model('evo_*') creates an evolved one.",
        'timm would load this model as the dense evo_foo, because it was created dense and then evolved. Restore it '
        "and save it with timm's save_for_hf or push_to_hf_hub.",
        'False']
    assert not list(tmp_path.iterdir())


# Whatever goes wrong


FAILURES = {
    'timm out of range': (
        {'timm/__init__.py': '__version__ = "0.9.12"\nfrom . import models\n', 'timm/models/__init__.py': ''},
        r'ImportError: timm-evo needs timm>=[\d.]+, but timm 0\.9\.12 is installed',
    ),
    'no wrapt': (
        {'wrapt.py': 'raise ModuleNotFoundError("No module named \'wrapt\'")\n'},
        r"ModuleNotFoundError: No module named 'wrapt'",
    ),
}


@pytest.mark.parametrize('failure', FAILURES)
def test_torch_and_timm_survive_a_broken_environment(failure, tmp_path):
    files, cause = FAILURES[failure]
    write_files(tmp_path, files)
    result = run('import torch, timm, timm.models; print("fine")', PYTHONPATH=str(tmp_path))
    assert result.stdout.strip() == 'fine', result.stderr
    assert len(re.findall('RuntimeWarning: timm-evo', result.stderr)) == 1, result.stderr
    assert re.search(cause, result.stderr), result.stderr


def test_an_explicit_import_raises_what_was_warned_of(tmp_path):
    files, cause = FAILURES['timm out of range']
    write_files(tmp_path, files)
    result = run('import timm_evo.entrypoints', PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert re.search(cause, result.stderr.splitlines()[-1]), result.stderr


def test_torch_and_timm_survive_a_broken_install(tmp_path):
    write_files(tmp_path, sources() | {'timm_evo/models/registry.py': 'broken ='})
    result = run('import torch, timm; print(timm.list_models("evo_*"))', PYTHONPATH=str(tmp_path))
    assert result.stdout.strip() == '[]', result.stderr
    assert len(re.findall('RuntimeWarning: timm-evo .* SyntaxError', result.stderr)) == 1, result.stderr
    result = run('import timm_evo.entrypoints', PYTHONPATH=str(tmp_path))
    assert 'SyntaxError' in result.stderr.splitlines()[-1]


def test_what_is_broken_beyond_registration_is_raised_where_a_model_is_created(tmp_path):
    write_files(tmp_path, sources() | {'timm_evo/method/published.py': 'broken ='})
    result = run('import torch, timm; print("fine"); timm.create_model("evo_test_vit")', PYTHONPATH=str(tmp_path))
    assert result.stdout.strip() == 'fine' and 'RuntimeWarning' not in result.stderr
    assert 'SyntaxError' in result.stderr.splitlines()[-1]


def sources() -> dict[str, str]:
    """The modules of the package by their paths."""
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / 'timm_evo').rglob('*.py')}


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


# The range of versions and the names of what to install: pyproject.toml says them, and whatever repeats them agrees


def oldest_versions() -> dict[str, str]:
    """Of Python, torch and timm, as pyproject.toml has them."""
    project = PYPROJECT['project']
    requirements = [f'Python{project["requires-python"]}', *project['dependencies']]
    return dict(found.groups() for requirement in requirements
                if (found := re.fullmatch(r'(Python|torch|timm)>=([\d.]+)', requirement)))


@pytest.mark.parametrize(
    'file', ['README.md', 'CHANGELOG.md', 'docs/quickstart.md', 'docs/develop.md', 'CONTRIBUTING.md'])
def test_a_page_that_says_the_range_says_that_of_pyproject(file):
    lines = [line for line in (ROOT / file).read_text().splitlines() if 'or newer' in line]
    stated = dict(re.findall(r'(Python|torch|timm) (\d[\d.]*\d)', '\n'.join(lines)))
    oldest = oldest_versions()
    assert stated == ({'Python': oldest['Python']} if file in ('docs/develop.md', 'CONTRIBUTING.md') else oldest)


def test_the_code_and_the_tools_take_the_range_of_pyproject():
    oldest, tools = oldest_versions(), PYPROJECT['tool']
    assert TIMM_MIN_VERSION == oldest['timm']
    assert tools['pyright']['pythonVersion'] == oldest['Python']
    assert tools['ruff']['target-version'] == f'py{oldest["Python"].replace(".", "")}'


def test_extras_and_groups_that_are_to_be_installed_are_there():
    patterns = ['Makefile', '*.md', 'docs/*.md', 'examples/*.py', 'examples/*.ipynb', 'timm_evo/**/*.py']
    text = '\n'.join(file.read_text() for pattern in patterns for file in ROOT.glob(pattern))
    extras = set(re.findall(r"(?:'\.|timm-evo)\[(\w+)\]'", text))
    groups = set(re.findall(r'--group (\w+)', text))
    assert extras == set(PYPROJECT['project']['optional-dependencies'])
    assert groups == set(PYPROJECT['dependency-groups'])


@pytest.mark.skipif(not shutil.which('make'), reason='there is no make')
def test_make_takes_the_oldest_timm_of_the_range_or_the_versions_that_it_is_told():
    def commands(*args: str) -> str:
        result = subprocess.run(['make', '-nB', *args], cwd=ROOT, capture_output=True, text=True, check=True)
        return result.stdout

    assert f' timm=={oldest_versions()["timm"]}\n' in commands('tests-oldest-timm')
    assert 'install --quiet torch==2.8.0 torchvision timm==1.0.26 ' in commands(
        'tests-torch', 'TORCH=2.8.0', 'TIMM=1.0.26')
    assert 'install --quiet torch torchvision timm ' in commands('tests-torch', 'TORCH=newest', 'TIMM=newest')


def test_continuous_integration_runs_with_the_versions_that_pyproject_names():
    workflow = ROOT / '.github' / 'workflows' / 'test.yml'
    if not workflow.exists():
        pytest.skip('a source distribution has no workflows')
    oldest, jobs = oldest_versions(), yaml.safe_load(workflow.read_text())['jobs']
    pythons = jobs['test']['strategy']['matrix']['python-version']
    assert pythons[0] == oldest['Python']
    assert pythons == re.findall(r'Python :: (3\.\d+)', '\n'.join(PYPROJECT['project']['classifiers']))
    matrix = jobs['versions']['strategy']['matrix']
    assert matrix['torch'][0].startswith(f'{oldest["torch"]}.') and matrix['timm'][0] == oldest['timm']
    assert matrix['torch'][-1] == matrix['timm'][-1] == 'newest'


@pytest.mark.skipif(not shutil.which('make'), reason='there is no make')
def test_the_site_is_deployed_from_a_strict_build():
    workflow = ROOT / '.github' / 'workflows' / 'docs.yml'
    if not workflow.exists():
        pytest.skip('a source distribution has no workflows')
    jobs = yaml.safe_load(workflow.read_text())['jobs']
    steps = jobs['build']['steps']
    assert 'make docs' in [step.get('run') for step in steps]
    assert steps[-1]['uses'].startswith('actions/upload-pages-artifact@') and steps[-1]['with'] == {'path': 'site/'}
    assert jobs['deploy']['needs'] == 'build'
    commands = subprocess.run(['make', '-nB', 'docs'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 'mkdocs build --strict\n' in commands


# What is published


@pytest.fixture(scope='module')
def sdist(tmp_path_factory) -> Path:
    """The source distribution; beside it is the wheel, which is built from it."""
    folder = tmp_path_factory.mktemp('dist')
    subprocess.run([sys.executable, '-m', 'build', '--outdir', str(folder), str(ROOT)], check=True, capture_output=True)
    return next(folder.glob('*.tar.gz'))


@pytest.fixture(scope='module')
def wheel(sdist) -> Path:
    return next(sdist.parent.glob('*.whl'))


def test_a_package_index_takes_both(sdist, wheel):
    pytest.importorskip('twine')
    result = subprocess.run(
        [sys.executable, '-m', 'twine', 'check', '--strict', str(sdist), str(wheel)], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count('PASSED') == 2, result.stdout + result.stderr


def test_the_sdist_holds_what_the_tests_need(sdist):
    with tarfile.open(sdist) as file:
        names = {name.partition('/')[2] for name in file.getnames()}
    files = [path for folder in ('tests', 'examples', 'recipes', 'timm_evo') for path in (ROOT / folder).rglob('*')]
    needed = {
        path.relative_to(ROOT).as_posix() for path in files if path.is_file() and '__pycache__' not in path.parts}
    assert needed | {'CHANGELOG.md', 'CITATION.cff', 'LICENSE', 'Makefile', 'README.md', 'pyproject.toml'} <= names
    assert not any('__pycache__' in name for name in names)


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        files = {name: file.read(name).decode() for name in file.namelist()}
    package = {*sources(), 'timm_evo/py.typed', 'timm_evo/inspection/page.html'}
    assert {name for name in files if '.dist-info/' not in name} == package
    text = {name.split('/', 1)[1]: content for name, content in files.items() if name not in package}
    assert '[torch.backends]' in text['entry_points.txt'] and '[console_scripts]' in text['entry_points.txt']
    assert re.search(r'^License(-Expression)?: Apache-2.0$', text['METADATA'], flags=re.M)
    assert re.search(r'^Author: timm-evo contributors$', text['METADATA'], flags=re.M)
    assert 'licenses/LICENSE' in text
    for name, version in oldest_versions().items():
        requirement = 'Requires-Python: ' if name == 'Python' else f'Requires-Dist: {name}'
        assert f'{requirement}>={version}\n' in text['METADATA']
    assert re.findall('^Provides-Extra: (.*)$', text['METADATA'], flags=re.M) == ['visualize']


def test_the_wheel_registers_the_models(wheel, tmp_path):
    """In an environment of its own, where this one's packages, but not its timm-evo, can be seen."""
    venv.create(tmp_path / 'env', with_pip=True)
    python = str(tmp_path / 'env' / 'bin' / 'python')
    # isolated, because pip takes what PYTHONPATH has of timm-evo for installed
    subprocess.run([python, '-I', '-m', 'pip', 'install', '--quiet', '--no-deps', str(wheel)], check=True)
    packages = tmp_path / 'packages'
    packages.mkdir()
    for entry in Path(timm.__file__).parents[1].iterdir():
        if 'timm_evo' not in entry.name:
            (packages / entry.name).symlink_to(entry)
    result = subprocess.run(
        [python, '-c', 'import timm, timm_evo; print(timm_evo.__file__); print(timm.list_models("evo_*"))'],
        cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(packages)}, capture_output=True, text=True)
    location, names = result.stdout.strip().splitlines()
    assert location.startswith(str(tmp_path / 'env'))
    assert names == str(NAMES), result.stderr
