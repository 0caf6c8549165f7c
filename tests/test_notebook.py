"""The notebook in examples/ runs from its first cell to its last, here with random weights."""
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


def test_the_notebook_is_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert cells and all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_the_notebook_runs(notebook, monkeypatch, tmp_path):
    monkeypatch.setenv('TIMM_EVO_PRETRAINED', '0')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    resources = {'metadata': {'path': str(tmp_path)}}  # what it writes goes there
    nbclient.NotebookClient(notebook, timeout=120, kernel_name='python3', resources=resources).execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs]
    text = ''.join(output.text for output in outputs if output.output_type == 'stream')
    assert "EvoVisionTransformer(\n  keep_ratio=0.7, selection='similarity'" in text
    assert 'EvoVisionTransformer True\nVisionTransformer\n' in text and text.endswith('\nTrue\n')
    assert sum('image/png' in output.get('data', {}) for output in outputs) == 2
    assert (tmp_path / 'evo_vit_tiny.pt2').is_file()
