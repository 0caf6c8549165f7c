"""The notebook in examples/ is stored as it was run, and runs from first cell to last, here with random weights."""
from pathlib import Path

import pytest

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')
pytest.importorskip('ipykernel')
pytest.importorskip('skimage')
NOTEBOOK = Path(__file__).parents[1] / 'examples' / 'quickstart.ipynb'


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def printed(cell) -> str:
    return ''.join(output.text for output in cell.outputs if output.output_type == 'stream' and output.name == 'stdout')


def has_picture(cell) -> bool:
    return any('image/png' in output.get('data', {}) for output in cell.outputs)


def test_the_notebook_is_stored_with_all_outputs_and_no_error(notebook):
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, 1 + len(cells)))  # in one go
    for cell in cells:
        kinds = {output.output_type for output in cell.outputs} | {output.get('name') for output in cell.outputs}
        assert not kinds & {'error', 'stderr'}, cell.source
        assert printed(cell) or 'print(' not in cell.source, cell.source
        assert has_picture(cell) or 'timm_evo.visualize(' not in cell.source, cell.source
    assert notebook.cells[-1] is cells[-1] and has_picture(cells[-1])


def test_the_notebook_runs_and_what_does_not_depend_on_weights_is_as_stored(notebook, monkeypatch, tmp_path):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    stored = [printed(cell) for cell in code_cells(notebook)]
    for cell in code_cells(notebook):
        cell.source = cell.source.replace('pretrained=True', 'pretrained=False')
        cell.outputs = []
    resources = {'metadata': {'path': str(tmp_path)}}  # what it writes goes there
    nbclient.NotebookClient(notebook, timeout=120, kernel_name='python3', resources=resources).execute()

    cells = code_cells(notebook)
    for cell, expected in zip(cells, stored, strict=True):
        if 'weights' not in cell.metadata.get('tags', []):
            assert printed(cell) == expected
    assert has_picture(cells[-1]) and (tmp_path / 'deit_tiny.pt2').is_file()
