"""The README and the pages of docs: their snippets run and print what they say, and their links lead somewhere."""
import re
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pytest
import timm

from timm_evo import cli

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / 'docs'))
import tables  # noqa: E402

SITE = 'https://timm-evo.github.io/timm-evo/'
REPOSITORY = re.compile(r'https://(?:github\.com/timm-evo/timm-evo/blob|raw\.githubusercontent\.com/timm-evo/timm-evo)'
                        r'/main/')
PAGES = [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))]
EACH_PAGE = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
BLOCK = re.compile(r'^( *)```(\w*)\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r'<!-- not run: .+ -->\s*\Z')


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        language: What stands behind the fence.
        text: What is between the fences.
        line: Number of the line after the first fence.
        runs: Whether no comment before it says that it does not.
        prints: The `text` block right behind it, if there is one.
    """
    language: str
    text: str
    line: int
    runs: bool
    prints: str | None


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding='utf-8')
    matches, blocks = list(BLOCK.finditer(text)), []
    for match, following in zip(matches, [*matches, None][1:], strict=True):
        prints = None
        if following is not None and following[2] == 'text' and not text[match.end():following.start()].strip():
            prints = following[3]
        line = text[:match.start(3)].count('\n') + 1
        blocks.append(Block(match[2], match[3], line, not NOT_RUN.search(text[:match.start()]), prints))
    return blocks


def without_blocks(page: Path) -> str:
    return BLOCK.sub('', page.read_text(encoding='utf-8'))


def heading_anchors(page: Path) -> set[str]:
    """As GitHub and mkdocs make them of headings."""
    headings = re.findall(r'^#+ (.*)$', without_blocks(page), re.MULTILINE)
    return {re.sub(r'\s', '-', re.sub(r'[^\w\s-]', '', heading).strip().lower()) for heading in headings}


PAGES_THAT_RUN = [page for page in PAGES if any(block.language == 'python' for block in read_blocks(page))]


@pytest.mark.parametrize('page', PAGES_THAT_RUN, ids=lambda page: page.name)
def test_snippets_run_and_print_what_the_page_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    matplotlib.use('agg')
    namespace = {'__name__': '__main__'}
    for block in read_blocks(page):
        if block.language != 'python':
            continue
        code = '\n' * (block.line - 1) + block.text  # so that a traceback has the line of the page
        compiled = compile(code.replace('pretrained=True', 'pretrained=False'), str(page), 'exec')
        if not block.runs:
            continue
        exec(compiled, namespace)
        printed = capsys.readouterr().out
        if block.prints is not None:
            assert printed == block.prints, f'{page.name}, line {block.line}'


@EACH_PAGE
def test_commands_print_what_the_page_says(page, capsys):
    for block in read_blocks(page):
        if block.language != 'console':
            continue
        command, expected = block.text.split('\n', 1)
        program, *arguments = command.removeprefix('$ ').split()
        assert program == 'timm-evo'
        cli.main(arguments)
        assert capsys.readouterr().out == expected, f'{page.name}, line {block.line}'


def linked_file(page: Path, path: str) -> Path | None:
    """What a link leads to in the repository: PyPI shows the README, so there links are whole addresses."""
    if path.startswith(SITE):
        return ROOT / 'docs' / path.removeprefix(SITE).replace('.html', '.md')
    if found := REPOSITORY.match(path):
        return ROOT / path[found.end():]
    if re.match(r'\w+:', path):
        return None
    return (page.parent / path).resolve() if path else page


@EACH_PAGE
def test_links_to_files_and_headings_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', without_blocks(page)):
        path, _, anchor = target.partition('#')
        if (file := linked_file(page, path)) is None:
            continue
        assert file.is_file(), f'{page.name}: {target}'
        assert not anchor or anchor in heading_anchors(file), f'{page.name}: {target}'


def test_every_result_is_on_a_page_or_in_the_list_of_earlier_ones():
    text = ''.join(page.read_text(encoding='utf-8') for page in PAGES)
    earlier = ROOT / 'benchmarks/results/README.md'
    shown = set(re.findall(r'benchmarks/results/([^)\s]+)', text))
    shown |= {earlier.name, *re.findall(r'\]\(([^/)]+)\)', earlier.read_text(encoding='utf-8'))}
    for file in ROOT.glob('benchmarks/results/*'):
        beside = [f'{file.stem}.md', f'{file.stem}.png'] if file.suffix in ('.json', '.jsonl') else []
        assert {file.name, *beside} & shown, file.name


@EACH_PAGE
def test_tables_say_what_results_and_arguments_say(page):
    """`python docs/tables.py` writes them."""
    assert tables.fill(page, tables.TABLES) == page.read_text(encoding='utf-8')


def test_every_model_is_of_a_family_in_the_table():
    page = (ROOT / 'docs/models.md').read_text(encoding='utf-8')
    families = {name: tables.family_of(name) for name in timm.list_models('evo_*')}
    assert all(families.values()), [name for name, family in families.items() if family is None]
    for family in tables.FAMILIES:
        assert family in families.values() and all(families[name] is family for name in family.examples), family
        assert all(f'| `{name}` |' in page for name in family.examples), family


@pytest.mark.parametrize('name', ['evo_deit_tiny_patch16_224', 'evo_vit_tiny_patch16_224', 'evo_levit_128s'])
def test_the_table_of_models_has_their_tokens_and_cost(name):
    """`python docs/tables.py --models` writes it."""
    page = (ROOT / 'docs/models.md').read_text(encoding='utf-8')
    assert '| ' + ' | '.join(tables.model_row(name)) + ' |' in page


def read_tables(file: Path) -> list[dict[str, list[str]]]:
    """Tables, each as the cells behind the first one of every row, in plain text."""
    found = re.findall(r'(?:^\|.*\n)+', without_blocks(file), re.MULTILINE)
    rows = [[line.strip('|').split('|') for line in table.splitlines()] for table in found]
    rows = [[[cell.strip(' *') for cell in row] for row in table] for table in rows]
    return [{tables.method(name): cells for name, *cells in table} for table in rows]


def test_what_is_kept_of_frozen_weights_is_what_was_measured():
    measured = [table for file in ROOT.glob('benchmarks/results/frozen_*.md') for table in read_tables(file)]
    num_rows = 0
    for page in PAGES:
        for table in read_tables(page):
            if not {'class token', 'top-1'} & set(table.get('', [])):
                continue
            for name in table.keys() - {'', '---'}:
                shown = {cell for cell in table[name] if cell not in ('-', 'none', 'TODO')}
                assert any(shown <= set(other.get(name, [])) for other in measured), f'{page.name}: {name}'
                num_rows += 1
    assert num_rows > 30
