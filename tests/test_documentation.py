"""The README and the pages of docs: their snippets run and print what they say, and their links lead somewhere."""
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pytest

from timm_evo import cli

ROOT = Path(__file__).parents[1]
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


@EACH_PAGE
def test_links_to_files_and_headings_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', without_blocks(page)):
        if re.match(r'\w+:', target):
            continue
        path, _, anchor = target.partition('#')
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f'{page.name}: {target}'
        assert not anchor or anchor in heading_anchors(file), f'{page.name}: {target}'


def test_every_result_is_on_a_page():
    text = ''.join(page.read_text(encoding='utf-8') for page in PAGES)
    shown = set(re.findall(r'benchmarks/results/([^)\s]+)', text))
    for file in ROOT.glob('benchmarks/results/*'):
        beside = [f'{file.stem}.md', f'{file.stem}.png'] if file.suffix in ('.json', '.jsonl') else []
        assert {file.name, *beside} & shown, file.name


def read_tables(file: Path) -> list[dict[str, list[str]]]:
    """Tables, each as the cells behind the first one of every row, in plain text."""
    tables = re.findall(r'(?:^\|.*\n)+', without_blocks(file), re.MULTILINE)
    rows = [[line.strip('|').split('|') for line in table.splitlines()] for table in tables]
    rows = [[[cell.strip(' *') for cell in row] for row in table] for table in rows]
    return [{name.replace(' r = ', ' '): cells for name, *cells in table} for table in rows]


def test_what_is_left_of_frozen_weights_is_what_was_measured():
    measured = [table for file in ROOT.glob('benchmarks/results/frozen_*.md') for table in read_tables(file)]
    num_rows = 0
    for page in PAGES:
        for table in read_tables(page):
            if 'class token' not in table.get('', []):
                continue
            for name in table.keys() - {'', '---'}:
                shown = {cell for cell in table[name] if cell not in ('-', 'none')}
                assert any(shown <= set(other.get(name, [])) for other in measured), f'{page.name}: {name}'
                num_rows += 1
    assert num_rows > 30
