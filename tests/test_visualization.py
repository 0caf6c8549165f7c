"""Pictures and pages of kept tokens show what `timm_evo.trace` tells."""
import base64
import io
import json
import re
import sys

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import timm_evo
from timm_evo import cli, visualization

SMALL = dict(img_size=48, patch_size=8, embed_dim=48, num_heads=3, depth=6)


@pytest.fixture
def photo() -> Image.Image:
    noise = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(noise[None], (90, 120), mode='bicubic')[0].clamp(0, 1)
    return Image.fromarray((255 * pixels).byte().permute(1, 2, 0).numpy())


def read_page(file) -> dict:
    return json.loads(re.search(r'^const data = (.*);$', file.read_text(), re.MULTILINE)[1])


@pytest.mark.parametrize('name, kwargs, num_selections', [
    ('evo_vit_tiny_patch16_224', SMALL, 2),
    ('evo_deit_tiny_patch16_224', SMALL, 2),
    ('evo_levit_128s', dict(img_size=128), 2),
])
def test_the_figure_has_a_column_for_each_selection(name, kwargs, num_selections, photo, tmp_path):
    model = timm.create_model(name, **kwargs)
    figure = timm_evo.visualize(photo, model)
    titles = [axis.get_title() for axis in figure.axes]
    selected = [title for title in titles if title.startswith('block ')]
    assert len(selected) == num_selections and titles[0] == 'image'
    assert titles.count('scores') == (0 if model.evolution['selection'] == 'similarity' else num_selections)
    photo.save(tmp_path / 'photo.png')
    figure = timm_evo.visualize(tmp_path / 'photo.png', model, keep_ratio=0.9)
    assert "keep_ratio=0.9" in figure.get_suptitle() and model.evolution['keep_ratio'] == 0.5


def test_a_dense_model_is_evolved_for_the_picture(photo):
    model = timm.create_model('vit_tiny_patch16_224', **SMALL)
    figure = timm_evo.visualize(photo, model, selection='stage', keep_ratio=0.7)
    assert "selection='stage'" in figure.get_suptitle()
    assert type(model) is timm.models.VisionTransformer


@pytest.mark.parametrize('name, kwargs', [
    ('evo_vit_tiny_patch16_224', SMALL),
    ('evo_deit_tiny_patch16_224', SMALL),
    ('evo_levit_128s', dict(img_size=128)),
])
def test_the_page_has_what_trace_tells(name, kwargs, photo, tmp_path):
    model = timm.create_model(name, **kwargs).eval()
    visualization.write_page(tmp_path / 'page.html', photo, model, keep_ratios=(0.6, 0.8))
    page = read_page(tmp_path / 'page.html')
    assert page['model'] == name.removeprefix('evo_') and page['selection'] == model.evolution['selection']
    assert [run['keep_ratio'] for run in page['runs']] == [0.6, 0.8]

    size = model.pretrained_cfg['input_size'][:1] + (kwargs['img_size'],) * 2
    images = create_transform(**resolve_data_config({'input_size': size}, model=model))(photo)[None]
    for run in page['runs']:
        model.set_evolution(keep_ratio=run['keep_ratio'])
        assert run['gmacs'] == pytest.approx(timm_evo.count_gmacs(model, images), abs=1e-3)
        for shown, selection in zip(run['selections'], timm_evo.trace(model, images), strict=True):
            assert (shown['block'], shown['height'], shown['width']) == (selection.block, *selection.slow.shape[1:])
            assert shown['slow'] == selection.slow.flatten().int().tolist()
            assert shown['follows'] == selection.follows.flatten().tolist()
            if selection.scores is None:
                assert shown['scores'] is None
            else:
                assert shown['scores'] == pytest.approx(selection.scores.flatten().tolist(), abs=1e-6)

    kind, encoded = page['image'].split(',')
    shown = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert kind == 'data:image/png;base64' and shown.size == (kwargs['img_size'],) * 2
    text = (tmp_path / 'page.html').read_text()
    assert not re.findall(r'(?:src|href)="|https?://|@import', text)  # it needs no other file


def test_a_page_needs_a_keep_ratio(photo, tmp_path):
    with pytest.raises(ValueError, match='a page needs at least one'):
        visualization.write_page(tmp_path / 'page.html', photo, timm.create_model('evo_test_vit'), keep_ratios=[])


def test_a_page_refuses_a_keep_ratio_before_it_runs_another(photo, tmp_path):
    model = timm.create_model('evo_test_vit')
    handle = model.register_forward_pre_hook(lambda module, args: pytest.fail('the model was run'))
    with pytest.raises(ValueError, match=r'keep_ratio=1.5 is not allowed'):
        visualization.write_page(tmp_path / 'page.html', photo, model, keep_ratios=[0.5, 1.5])
    handle.remove()


# The commands


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(timm.create_model('evo_vit_tiny_patch16_224', **SMALL).state_dict(), tmp_path / 'model.pth')
    return tmp_path / 'model.pth'


@pytest.mark.parametrize('output', ['kept.png', 'kept.html'])
def test_the_command_draws(output, photo, checkpoint, tmp_path, capsys):
    photo.save(tmp_path / 'photo.jpg')
    kwargs = [f'{key}={value}' for key, value in SMALL.items()]
    cli.main([
        'visualize', str(tmp_path / 'photo.jpg'), '--model', 'evo_vit_tiny_patch16_224',
        '--checkpoint', str(checkpoint), '--model-kwargs', *kwargs, '--output', str(tmp_path / output)])
    assert capsys.readouterr().out.strip() == str(tmp_path / output)
    if output.endswith('.html'):
        assert [run['keep_ratio'] for run in read_page(tmp_path / output)['runs']] == [0.3, 0.5, 0.7, 0.9]
    else:
        assert Image.open(tmp_path / output).width > 500


@pytest.mark.parametrize('arguments, message', [
    (['no.jpg', '--model', 'evo_test_vit', '--output', 'out.bmp'], r'--output out.bmp is not allowed, .* \.html or '),
    (['no.jpg', '--model', 'evo_test_vit', '--output', 'no/out.png'], 'there is no folder no'),
    (['no.jpg', '--model', 'evo_test_vti', '--output', 'out.png'], 'no model evo_test_vti. Did you mean evo_test_vit'),
    (['no.jpg', '--model', 'evo_test_vit', '--output', 'out.png'], 'No such file .*no.jpg'),
    (['no.jpg', '--model', 'evo_test_vit', '--keep-ratios', '0.5', '--output', 'out.png'], 'is for a page'),
])
def test_the_command_refuses_before_any_work(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        cli.main(['visualize', *arguments])
    assert not list(tmp_path.iterdir())


def test_a_picture_without_matplotlib_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(SystemExit, match=r"pip install 'timm-evo\[visualize\]'"):
        cli.main(['visualize', 'no.jpg', '--model', 'evo_test_vit', '--output', str(tmp_path / 'out.png')])


@pytest.mark.parametrize('name', ['evo_deit_tiny_patch16_224', 'evo_levit_cls_128s', 'evo_vit_small_patch14_dinov2'])
def test_info_tells_what_a_model_is(name, capsys):
    cli.main(['info', name])
    text = capsys.readouterr().out
    model = timm.create_model(name).eval()
    image = torch.randn(1, *model.pretrained_cfg['input_size'])
    assert f'GMACs       {timm_evo.count_gmacs(model, image):.2f}, dense ' in text
    assert f'parameters  {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M' in text
    assert repr(model).splitlines()[1].strip() in text
    assert ('timm/' in text) == ('cls' not in name)


def test_info_counts_the_tokens_of_each_block(capsys):
    cli.main(['info', 'evo_deit_tiny_patch16_224', '--model-kwargs', 'keep_ratio=0.25', 'img_size=160'])
    assert re.findall(r'^  (\d.*?) +(\d+)$', capsys.readouterr().out, re.MULTILINE) == [
        ('0 to 3', '101'), ('4 to 11', '27')]  # 100 patches; 25, class token and representative token
    with pytest.raises(SystemExit, match='Did you mean keep_ratio'):
        cli.main(['info', 'evo_deit_tiny_patch16_224', '--model-kwargs', 'keep_raito=0.25'])
    with pytest.raises(SystemExit, match='deit_tiny_patch16_224 is not evolved, evo_deit_tiny_patch16_224 is'):
        cli.main(['info', 'deit_tiny_patch16_224'])


def test_the_command_tells_its_version(capsys):
    with pytest.raises(SystemExit, match='0'):
        cli.main(['--version'])
    assert capsys.readouterr().out.startswith(f'timm-evo {timm_evo.__version__}, timm {timm.__version__}, torch ')
