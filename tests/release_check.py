"""A dry run of a release: build, check, install from a local index where there is only pip, use, and uninstall.

    python tests/release_check.py --python python3.10 --torch 2.5.1

`make release-check` calls it. pip takes what the wheel needs from where it is set up to take it (`PIP_INDEX_URL`,
`PIP_FIND_LINKS`). With `--packages`, the environment sees the packages of a folder, and pip installs what is missing.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from test_documentation import read_blocks

from timm_evo import __version__

ROOT = Path(__file__).parents[1]
# What runs the README in the new environment, which has no pytest: a page from top to bottom in one namespace.
RUN_BLOCKS = """
import contextlib, io, json, sys
namespace = {'__name__': '__main__'}
for code, expected in json.loads(sys.stdin.read()):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, 'README.md', 'exec'), namespace)
    print(out.getvalue(), end='')
    assert expected is None or out.getvalue() == expected, f'the README says {expected!r}'
"""
INSTALLED = """
import timm, torch, timm_evo
from importlib.metadata import version
assert timm_evo.__version__ == version('timm-evo'), version('timm-evo')
assert timm_evo.__file__.startswith(__import__('sys').prefix), timm_evo.__file__
names = timm.list_models('evo_*')
timm.create_model('evo_test_vit')(torch.randn(2, 3, 160, 160)).sum().backward()
print('torch', torch.__version__, 'timm', timm.__version__, len(names), 'models')
"""
UNINSTALLED = """
import timm, torch
from importlib.util import find_spec
assert timm.list_models('evo_*') == [] and find_spec('timm_evo') is None
print('timm works without')
"""


def run(*command: str | Path, environment: dict[str, str] | None = None, **kwargs) -> str:
    """Output of a command. If the command fails, print all of its output and exit."""
    result = subprocess.run(
        [str(part) for part in command], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        **kwargs)
    if result.returncode:
        sys.exit(f'{" ".join(str(part) for part in command[:6])} ...\n{result.stdout}')
    return result.stdout


def build(folder: Path) -> str:
    """Build both distributions, check them, and make a package index of them. The wheel is built from the sdist.

    Returns:
        Address of the index.
    """
    run(sys.executable, '-m', 'build', '--outdir', folder, ROOT)
    sdist, wheel = next(folder.glob('*.tar.gz')), next(folder.glob('*.whl'))
    print(run(sys.executable, '-m', 'twine', 'check', '--strict', sdist, wheel), end='')
    with tarfile.open(sdist) as file, zipfile.ZipFile(wheel) as zipped:
        print(f'{sdist.name}: {len(file.getnames())} files, {sdist.stat().st_size / 1e6:.1f} MB')
        print(f'{wheel.name}: {len(zipped.namelist())} files, {wheel.stat().st_size / 1e6:.2f} MB')
    page = folder / 'index' / 'timm-evo' / 'index.html'
    page.parent.mkdir(parents=True)
    page.write_text(''.join(f'<a href="{file.as_uri()}">{file.name}</a>\n' for file in (sdist, wheel)))
    return page.parents[1].as_uri()


def check(index: str, folder: Path, args: argparse.Namespace) -> None:
    """Install the package from the index in a new environment, use it as the README says, and uninstall it."""
    # nothing that this process sees may be seen there; there are no weights to download
    environment = {name: value for name, value in os.environ.items() if not name.startswith('PYTHON')}
    environment |= {'HF_HUB_OFFLINE': '1', 'PYTHONWARNINGS': 'error:::timm_evo'}
    run(args.python, '-m', 'venv', folder / 'env', environment=environment)
    python = folder / 'env' / 'bin' / 'python'
    if args.packages is not None:
        link_packages(args.packages, Path(run(
            python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', environment=environment).strip()))
    pins = [f'{name}=={pin}' for name, pin in (('torch', args.torch), ('timm', args.timm)) if pin != 'newest']
    run(python, '-m', 'pip', 'install', '--quiet', '--extra-index-url', index, f'timm-evo=={__version__}', *pins,
        environment=environment)
    if args.packages is None:  # a folder may have more in it than goes together
        run(python, '-m', 'pip', 'check', environment=environment)

    empty = folder / 'empty'
    empty.mkdir()
    print(run(python, '--version', environment=environment, cwd=empty), end='')
    print(run(python, '-c', INSTALLED, environment=environment, cwd=empty), end='')
    print(run(folder / 'env' / 'bin' / 'timm-evo', '--version', environment=environment, cwd=empty), end='')
    blocks = read_blocks(ROOT / 'README.md')
    snippets = [[block.text.replace('pretrained=True', 'pretrained=False'), block.prints]
                for block in blocks if block.language == 'python' and block.runs]
    print(f'the {len(snippets)} snippets of the README:')
    print(run(python, '-c', RUN_BLOCKS, environment=environment, cwd=empty, input=json.dumps(snippets)), end='')
    commands = [block.text.split('\n', 1) for block in blocks if block.language == 'console']
    for command, expected in commands:
        program, *arguments = command.removeprefix('$ ').split()
        assert run(folder / 'env' / 'bin' / program, *arguments, environment=environment, cwd=empty) == expected

    run(python, '-m', 'pip', 'uninstall', '--quiet', '--yes', 'timm-evo', environment=environment)
    print(run(python, '-c', UNINSTALLED, environment=environment, cwd=empty), end='')
    left = [path for path in (folder / 'env').rglob('*') if re.match(r'timm[_-]evo', path.name)]
    assert not left, left


def link_packages(packages: Path, site: Path) -> None:
    """Have an environment see all packages of a folder but this one, pip and what pip comes with."""
    for entry in packages.iterdir():
        if 'timm_evo' not in entry.name and not entry.name.endswith('.pth') and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry.absolute())


def main() -> None:
    parser = argparse.ArgumentParser(description='Build, check, install, use and uninstall a release; publish none.')
    parser.add_argument('--python', default=sys.executable, help='of the new environment (default: the one that runs)')
    parser.add_argument('--torch', default='newest', help='release to install, such as 2.5.1 (default: newest)')
    parser.add_argument('--timm', default='newest', help='release of timm, or newest')
    parser.add_argument(
        '--packages', type=Path, metavar='DIR', help='site-packages to see instead of installing them')
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        index = build(Path(folder) / 'dist')
        check(index, Path(folder), args)
    print('released as it stands, this works')


if __name__ == '__main__':
    main()
