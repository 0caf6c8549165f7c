"""What mkdocs does beside its own work.

* Files outside this folder that a page or the navigation names become a part of the site, so `[...](../CHANGELOG.md)`
  leads somewhere on the site as well as in the repository. A notebook becomes a page.
* Types of other libraries in the API lead to their documentation.
* `Docstrings`, for griffe, which reads the sources: names of the API are links, and `**arguments` have no default.
"""
import json
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PLACE = 'project'  # of these files on the site
TORCH = 'https://docs.pytorch.org/docs/stable/'
PYTHON = 'https://docs.python.org/3/library/'
TYPES = {
    'torch.Tensor': f'{TORCH}tensors.html#torch.Tensor',
    'torch.nn.Module': f'{TORCH}generated/torch.nn.Module.html',
    'matplotlib.figure.Figure': 'https://matplotlib.org/stable/api/figure_api.html#matplotlib.figure.Figure',
    'PIL.Image.Image': 'https://pillow.readthedocs.io/en/stable/reference/Image.html#PIL.Image.Image',
    'numpy.ndarray': 'https://numpy.org/doc/stable/reference/generated/numpy.ndarray.html',
    'pathlib.Path': f'{PYTHON}pathlib.html#pathlib.Path',
    'collections.abc.Iterator': f'{PYTHON}collections.abc.html#collections.abc.Iterator',
    'collections.abc.Sequence': f'{PYTHON}collections.abc.html#collections.abc.Sequence',
    'typing.Any': f'{PYTHON}typing.html#typing.Any',
    'typing.NamedTuple': f'{PYTHON}typing.html#typing.NamedTuple',
    **{name: f'{PYTHON}stdtypes.html#{name}' for name in ('dict', 'list', 'tuple', 'str')},
    **{name: f'{PYTHON}functions.html#{name}' for name in ('bool', 'float', 'int')},
    **{name: f'{PYTHON}exceptions.html#{name}' for name in (
        'TypeError', 'ValueError', 'RuntimeError', 'ImportError', 'FileNotFoundError', 'FileExistsError')},
}


def on_files(files: Files, config: MkDocsConfig) -> None:
    pages = [page.content_string for page in files.documentation_pages()]
    named = {path for text in pages for path in re.findall(r'\]\(\.\./([^)#\s]+)', text)}
    named |= {path.replace('.ipynb.md', '.ipynb') for path in re.findall(rf'{PLACE}/([^\'"]+)', str(config.nav))}
    for path in sorted(named):
        source, place = ROOT / path, f'{PLACE}/{page_name(path)}'
        if path.endswith('.ipynb'):
            files.append(File.generated(config, place, content=notebook_page(source)))
        elif source.is_file():  # otherwise mkdocs says which link leads nowhere
            files.append(File.generated(
                config, place, abs_src_path=str(source), inclusion=InclusionLevel.NOT_IN_NAV))


def on_page_markdown(markdown: str, page: Page, **kwargs) -> str:
    if page.file.src_uri.startswith(f'{PLACE}/'):  # a file of the root that leads to pages
        return markdown.replace('](docs/', '](../')
    return re.sub(r'\]\(\.\./([^)#\s]+)', lambda link: f']({PLACE}/{page_name(link[1])}', markdown)


def on_env(env, config: MkDocsConfig, **kwargs) -> None:
    for name, url in TYPES.items():
        config.plugins['autorefs'].register_url(name, url)


def page_name(path: str) -> str:
    return f'{path}.md' if path.endswith('.ipynb') else path


def notebook_page(file: Path) -> str:
    """A notebook as markdown: cells and what they printed."""
    parts = []
    for cell in json.loads(file.read_text(encoding='utf-8'))['cells']:
        text = ''.join(cell['source'])
        parts.append(text if cell['cell_type'] == 'markdown' else f'```python\n{text}\n```')
        for output in cell.get('outputs', []):
            data = output.get('data', {})
            if 'image/png' in data:
                picture = ''.join(data['image/png']).strip()
                parts.append(f'![What the cell above draws](data:image/png;base64,{picture})')
            elif text := ''.join(output.get('text', data.get('text/plain', []))).rstrip():
                parts.append(f'```text\n{text}\n```')
    return '\n\n'.join(parts) + '\n'


class Docstrings(griffe.Extension):
    """For pages of the API."""

    def __init__(self) -> None:
        paths = re.findall(r'^::: (\S+)$', (ROOT / 'docs/api.md').read_text(encoding='utf-8'), re.MULTILINE)
        self.paths = {path.rpartition('.')[2]: path for path in paths}

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r'(?<!`)`(\w+)`(?!`)', self._link, obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **kwargs) -> None:
        for parameter in func.parameters:
            if parameter.kind in (griffe.ParameterKind.var_positional, griffe.ParameterKind.var_keyword):
                parameter.default = None

    def _link(self, name: re.Match[str]) -> str:
        return f'[{name[0]}][{self.paths[name[1]]}]' if name[1] in self.paths else name[0]
