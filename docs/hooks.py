"""What mkdocs does beside its own work: files outside this folder that a page links to become a part of the site.

So `[...](../benchmarks/results/...)` leads somewhere on the site as well as in the repository.
"""
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
PLACE = 'project'  # of these files on the site


def on_files(files: Files, config: MkDocsConfig) -> None:
    pages = [page.content_string for page in files.documentation_pages()]
    for path in sorted({path for text in pages for path in re.findall(r'\]\(\.\./([^)#\s]+)', text)}):
        if (ROOT / path).is_file():  # otherwise mkdocs says which link leads nowhere
            files.append(File.generated(
                config, f'{PLACE}/{path}', abs_src_path=str(ROOT / path), inclusion=InclusionLevel.NOT_IN_NAV))


def on_page_markdown(markdown: str, **kwargs) -> str:
    return markdown.replace('](../', f']({PLACE}/')
