"""Pictures and pages of selected tokens show the selections of `timm_evo.trace`."""
import argparse
import base64
import io
import json
import pickle
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models._hub import save_for_hf

import timm_evo
from timm_evo import checkpoints, cli
from timm_evo.inspection import building, visualization

SMALL = dict(img_size=48, patch_size=8, embed_dim=48, num_heads=3, depth=6)


@pytest.fixture
def photo() -> Image.Image:
    noise = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(noise[None], (90, 120), mode='bicubic')[0].clamp(0, 1)
    return Image.fromarray((255 * pixels).byte().permute(1, 2, 0).numpy())


def read_page(file) -> dict:
    return json.loads(re.search(r'^const data = (.*);$', file.read_text(), re.MULTILINE)[1])


@pytest.mark.parametrize('name, kwargs, num_selections', [
    ('evo_vit_tiny_patch16_224', SMALL, 4),
    ('evo_deit_tiny_patch16_224', SMALL, 2),
    ('evo_levit_128s', dict(img_size=128), 2),
])
def test_the_figure_has_a_picture_for_each_selection(name, kwargs, num_selections, photo, tmp_path):
    model = timm.create_model(name, **kwargs)
    figure = timm_evo.visualize(photo, model)
    titles = [axis.get_title() for axis in figure.axes]
    selected = [title for title in titles if title.startswith('block ')]
    assert len(selected) == num_selections and titles[0] == 'image'
    assert titles.count('scores') == (0 if model.evolution['selection'] == 'similarity' else num_selections)
    photo.save(tmp_path / 'photo.png')
    figure = timm_evo.visualize(tmp_path / 'photo.png', model, keep_ratio=0.9)
    assert "keep_ratio=0.9" in figure.get_suptitle() and model.evolution['keep_ratio'] == 0.5


@pytest.mark.parametrize('kwargs, rows', [
    (dict(selection='similarity', depth=12),
     [['image', 'block 3', 'block 4', 'block 5'], ['block 6', 'block 7', '', '']]),
    (dict(selection='layer', depth=9, start_block=2),
     [['image', 'block 2', 'block 3', 'block 4'], ['', 'scores', 'scores', 'scores'],
      ['block 5', 'block 6', 'block 7', 'block 8'], ['scores'] * 4]),
])
def test_many_selections_are_drawn_in_rows_of_four(kwargs, rows, photo):
    figure = timm_evo.visualize(photo, create(**kwargs))
    assert [axis.get_title().partition(':')[0] for axis in figure.axes] == sum(rows, [])


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


# Images


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn last: the image that the model got (1, C, H, W), and the photo (H, W, 3)."""
    last = []
    prepare = visualization._prepare
    monkeypatch.setattr(visualization, '_prepare', lambda *args: last.append(prepare(*args)) or last[-1])
    return lambda: last[-1]


def create(name: str = 'evo_vit_tiny_patch16_224', **kwargs):
    return timm.create_model(name, **SMALL | kwargs).eval()


def test_an_array_is_drawn_as_the_photo_that_it_is(photo, drawn):
    model, array = create(), np.asarray(photo)
    timm_evo.visualize(photo, model)
    pixels, shown = drawn()
    transparent = np.concatenate([array, np.zeros_like(array[:, :, :1])], axis=2)
    for other in (array, transparent):
        timm_evo.visualize(other, model)
        assert torch.equal(drawn()[0], pixels) and torch.equal(drawn()[1], shown)
    timm_evo.visualize(array[:, :, 0], model)
    grey = drawn()[1]
    assert torch.allclose(grey[:, :, 0], grey[:, :, 2], atol=1e-6)


def test_a_tensor_is_taken_as_it_is_alone_or_as_a_batch_of_one(drawn):
    model = create()
    image = torch.randn(3, 48, 48)
    timm_evo.visualize(image, model)
    pixels, shown = drawn()
    assert torch.equal(pixels, image[None])
    mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ('mean', 'std'))
    assert torch.allclose(shown, (image.permute(1, 2, 0) * std + mean).clamp(0, 1), atol=1e-6)
    timm_evo.visualize(image[None], model)
    assert torch.equal(drawn()[0], pixels)


def test_a_photo_is_grey_for_a_model_of_one_channel(photo, drawn, tmp_path):
    model = create(in_chans=1)
    timm_evo.visualize(photo, model)
    pixels, shown = drawn()
    assert pixels.shape == (1, 1, 48, 48) and shown.shape == (48, 48, 3)
    assert torch.equal(shown[:, :, 0], shown[:, :, 1]) and 0 < shown.std() < 1
    visualization.write_page(tmp_path / 'page.html', photo, model)
    assert read_page(tmp_path / 'page.html')['width'] == 48


@pytest.mark.parametrize('channels', [2, 4, 6])
def test_other_numbers_of_channels_are_drawn_as_their_mean(channels, drawn, photo, tmp_path):
    model = create(in_chans=channels)
    image = torch.randn(channels, 48, 48)
    timm_evo.visualize(image, model)
    shown, mean = drawn()[1], image.mean(dim=0)
    assert torch.equal(shown[:, :, 0], shown[:, :, 2])
    expected = (mean - mean.min()) / (mean.max() - mean.min())
    torch.testing.assert_close(shown[:, :, 0], expected.to(shown), rtol=0, atol=1e-5)
    visualization.write_page(tmp_path / 'page.html', image, model)
    with pytest.raises(ValueError, match=rf'takes {channels} channels. It must be a tensor \({channels}, H, W\)'):
        timm_evo.visualize(photo, model)


@pytest.mark.parametrize('image', [
    torch.randn(2, 3, 48, 48), torch.randn(48, 48), torch.randn(1, 48, 48), torch.randn(4, 48, 48),
    torch.randn(3, 48, 40), torch.randn(3, 56, 48), torch.randn(48, 48, 3), torch.zeros(3, 48, 48, dtype=torch.uint8),
    torch.randn(0, 3, 48, 48), torch.randn(3, 0, 0),
], ids=lambda image: f'{tuple(image.shape)} {image.dtype}')
@pytest.mark.parametrize('draw', ['figure', 'page'])
def test_a_tensor_that_is_no_prepared_image_is_refused(image, draw, tmp_path):
    model = create()
    with pytest.raises(ValueError, match=re.escape(f'tensor {tuple(image.shape)}') + r'.* one image \(3, 48, 48\) of '):
        if draw == 'page':
            visualization.write_page(tmp_path / 'page.html', image, model)
        else:
            timm_evo.visualize(image, model)
    assert not list(tmp_path.iterdir())


def test_a_tensor_fits_the_patches_of_a_model_that_takes_many_sizes():
    model = create(dynamic_img_size=True)
    timm_evo.visualize(torch.randn(3, 64, 32), model)
    for size in ((64, 36), (0, 32), (4, 32)):
        with pytest.raises(ValueError, match=r'one image \(3, H, W\) with H and W multiples of 8 and 8 of'):
            timm_evo.visualize(torch.randn(3, *size), model)
    timm_evo.visualize(torch.randn(3, 50, 50), create(dynamic_img_size=True, dynamic_img_pad=True))
    with pytest.raises(ValueError, match=r'one image \(3, 128, 128\) of'):
        timm_evo.visualize(torch.randn(3, 128, 144), timm.create_model('evo_levit_128s', img_size=128))


@pytest.mark.parametrize('image, error, message', [
    (np.zeros((48, 48, 3), np.float32), ValueError, r'array \(48, 48, 3\) of float32. It must be a photo'),
    (np.zeros((3, 48, 48), np.uint8), ValueError, r'array \(3, 48, 48\) of uint8. It must be a photo'),
    (np.zeros((1, 48, 48, 3), np.uint8), ValueError, r'array \(1, 48, 48, 3\) of uint8'),
    (np.zeros((0, 48, 3), np.uint8), ValueError, r'array \(0, 48, 3\) of uint8'),
    ([[1, 2]], TypeError, 'image cannot be a list. It must be a photo'),
    (None, TypeError, 'image cannot be a NoneType'),
    ('no.jpg', FileNotFoundError, 'no image file no.jpg'),
    (Path('.'), FileNotFoundError, 'no image file .'),
])
def test_what_is_no_photo_is_refused(image, error, message, tmp_path):
    with pytest.raises(error, match=message):
        timm_evo.visualize(image, create())
    with pytest.raises(error, match=message):
        visualization.write_page(tmp_path / 'page.html', image, create())


def test_a_page_needs_a_keep_ratio(photo, tmp_path):
    with pytest.raises(ValueError, match='A page needs at least one keep ratio'):
        visualization.write_page(tmp_path / 'page.html', photo, timm.create_model('evo_test_vit'), keep_ratios=[])


def test_a_page_refuses_a_keep_ratio_before_it_runs_another(photo, tmp_path):
    model = timm.create_model('evo_test_vit')
    handle = model.register_forward_pre_hook(lambda module, args: pytest.fail('the model was run'))
    with pytest.raises(ValueError, match=r'keep_ratio=1.5 is not allowed'):
        visualization.write_page(tmp_path / 'page.html', photo, model, keep_ratios=[0.5, 1.5])
    handle.remove()


# What is drawn of patches that do not go through the blocks


def test_by_similarity_each_group_has_its_mean_colour_and_none_is_dark(photo, drawn):
    model = create()
    figure = timm_evo.visualize(photo, model)
    assert 'are averaged' in figure.get_supxlabel() and 'Dark' not in figure.get_supxlabel()
    pixels, shown = drawn()
    selections = timm_evo.trace(model, pixels)
    assert selections
    for axis, selection in zip(figure.axes[1:1 + len(selections)], selections, strict=True):
        assert f'36 patches, {selection.slow.sum()} tokens' in axis.get_title()
        picture = torch.as_tensor(np.asarray(axis.images[0].get_array()))
        for place in selection.follows.unique():
            inside = (selection.follows[0] == place).repeat_interleave(8, dim=0).repeat_interleave(8, dim=1)
            torch.testing.assert_close(picture[inside].mean(dim=0), shown[inside].mean(dim=0), rtol=0, atol=1e-5)
            assert inside.sum() == 64 or picture[inside].std(dim=0).max() < 1e-5


@pytest.mark.parametrize('fast_update, others', [(True, 'are updated by a'), (False, 'stay as they are')])
def test_as_published_the_patches_that_skip_the_blocks_are_dark(fast_update, others, photo, drawn):
    model = create(selection='stage', fast_update=fast_update)
    figure = timm_evo.visualize(photo, model)
    assert re.search(f'Dark patches skip the blocks.* {others}', figure.get_supxlabel())
    pixels, shown = drawn()
    selections = timm_evo.trace(model, pixels)
    for axis, selection in zip(figure.axes[1:1 + len(selections)], selections, strict=True):
        slow = selection.slow[0].repeat_interleave(8, dim=0).repeat_interleave(8, dim=1).unsqueeze(2)
        picture = torch.as_tensor(np.asarray(axis.images[0].get_array()))
        torch.testing.assert_close(picture, shown.where(slow, 0.2 * shown), rtol=0, atol=1e-5)


# What is predicted


def likeliest(model, pixels, names) -> list[tuple[str, float]]:
    values, numbers = model(pixels)[0].detach().softmax(dim=0).topk(3)
    return [(names[i], value) for i, value in zip(numbers.tolist(), values.tolist(), strict=True)]


def percentages(prediction) -> str:
    return ', '.join(f'{name} {value:.0%}' for name, value in prediction)


def test_the_prediction_is_written_dense_and_evolved(photo, drawn, tmp_path):
    model, names = create(num_classes=5, keep_ratio=0.3), list('abcde')
    torch.nn.init.normal_(model.head.weight)
    figure = timm_evo.visualize(photo, model, names)
    pixels = drawn()[0]
    evolved = likeliest(model, pixels, names)
    visualization.write_page(tmp_path / 'page.html', photo, model, [0.3, 0.8], names)
    model.set_evolution(keep_ratio=0.8)
    second = likeliest(model, pixels, names)
    dense = likeliest(timm_evo.restore(model), pixels, names)
    assert dense != evolved != second
    assert figure.get_suptitle().splitlines()[1:] == [
        f'dense: {percentages(dense)}', f'evolved: {percentages(evolved)}']
    page = read_page(tmp_path / 'page.html')
    for shown, expected in zip(
            (page['prediction'], *(run['prediction'] for run in page['runs'])), (dense, evolved, second), strict=True):
        assert [name for name, _ in shown] == [name for name, _ in expected]
        assert [share for _, share in shown] == pytest.approx([share for _, share in expected], abs=1e-6)


def test_classes_of_imagenet_have_their_names(photo):
    model = create()
    torch.nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        model.head.bias[285], model.head.bias[281] = 9, 8.5
    lines = timm_evo.visualize(photo, model).get_suptitle().splitlines()
    assert all(re.match(rf'{kind}: Egyptian cat \d+%, tabby \d+%, ', line)
               for kind, line in zip(('dense', 'evolved'), lines[1:], strict=True))


@pytest.mark.parametrize('kwargs', [dict(num_classes=7), dict(num_classes=0), dict(num_classes=0, global_pool='')])
def test_no_prediction_is_written_if_the_names_are_not_known(kwargs, photo, tmp_path):
    model = create(**kwargs)
    assert len(timm_evo.visualize(photo, model).get_suptitle().splitlines()) == 1
    visualization.write_page(tmp_path / 'page.html', photo, model)
    assert read_page(tmp_path / 'page.html')['prediction'] is None
    with pytest.raises(ValueError, match=r'classes has 2 names, but .* has the shape \(1, .* one name for'):
        timm_evo.visualize(photo, model, classes=['a', 'b'])


# The commands


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(timm.create_model('evo_vit_tiny_patch16_224', **SMALL).state_dict(), tmp_path / 'model.pth')
    return tmp_path / 'model.pth'


@pytest.mark.parametrize('output', ['kept.png', 'kept.html', 'kept.PNG', 'kept.HTML'])
def test_the_command_draws(output, photo, checkpoint, tmp_path, capsys):
    photo.save(tmp_path / 'photo.jpg')
    kwargs = [f'{key}={value}' for key, value in SMALL.items()]
    cli.main([
        'visualize', str(tmp_path / 'photo.jpg'), '--model', 'evo_vit_tiny_patch16_224',
        '--checkpoint', str(checkpoint), '--model-kwargs', *kwargs, '--output', str(tmp_path / output)])
    assert capsys.readouterr().out.strip() == str(tmp_path / output)
    if output.lower().endswith('.html'):
        assert [run['keep_ratio'] for run in read_page(tmp_path / output)['runs']] == [0.3, 0.5, 0.7, 0.9]
    else:
        assert Image.open(tmp_path / output).width > 500


def test_the_command_evolves_a_dense_model_with_the_arguments_given(photo, tmp_path):
    photo.save(tmp_path / 'photo.jpg')
    torch.save(timm.create_model('vit_tiny_patch16_224', **SMALL).state_dict(), tmp_path / 'model.pth')
    arguments = [
        'visualize', tmp_path / 'photo.jpg', '--model', 'vit_tiny_patch16_224', '--checkpoint', tmp_path / 'model.pth',
        '--output', tmp_path / 'out.html', '--model-kwargs', *KWARGS, 'selection=stage', 'stage_depth=1']
    cli.main([str(argument) for argument in arguments])
    page = read_page(tmp_path / 'out.html')
    assert page['selection'] == 'stage' and len(page['runs'][0]['selections']) == 4
    assert re.search('keep_ratio=2 is not allowed', message(*arguments, 'keep_ratio=2'))


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'evo_vit_tiny_patch16_224', 'deit_tiny_patch16_224.fb_in1k'])
def test_arguments_of_evolution_are_those_of_any_name(name):
    model = building.build(name, SMALL | dict(keep_ratio=0.7, class_token=False, global_pool='avg'))
    assert isinstance(model, timm_evo.EvoVisionTransformer) and model.evolution['keep_ratio'] == 0.7
    assert model.cls_token is None  # the argument of timm's ViT, not that of an evolved LeViT


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'evo_vit_tiny_patch16_224'])
def test_arguments_of_evolution_are_those_of_a_folder(name, tmp_path):
    save_for_hf(timm.create_model(name, **SMALL), tmp_path, model_args=SMALL)
    model = building.build(f'local-dir:{tmp_path}', dict(keep_ratio=0.7), pretrained=True)
    assert isinstance(model, timm_evo.EvoVisionTransformer) and model.evolution['keep_ratio'] == 0.7


def test_the_command_takes_the_names_of_classes_from_a_file(photo, tmp_path):
    photo.save(tmp_path / 'photo.jpg')
    torch.save(create(num_classes=2).state_dict(), tmp_path / 'model.pth')
    (tmp_path / 'names.txt').write_text('weiß\nschwarz\n', encoding='utf-8')
    arguments = [
        'visualize', tmp_path / 'photo.jpg', '--model', 'evo_vit_tiny_patch16_224', '--checkpoint',
        tmp_path / 'model.pth', '--model-kwargs', 'num_classes=2', *KWARGS, '--output', tmp_path / 'out.html',
        '--classes']
    cli.main([str(argument) for argument in [*arguments, tmp_path / 'names.txt']])
    page = read_page(tmp_path / 'out.html')
    assert {name for name, _ in page['prediction']} == {'weiß', 'schwarz'}
    assert 'no.txt cannot be read as names of classes' in message(*arguments, tmp_path / 'no.txt')
    assert 'photo.jpg cannot be read as names of classes' in message(*arguments, tmp_path / 'photo.jpg')


@pytest.mark.parametrize('arguments, message', [
    (['no.jpg', '--model', 'evo_test_vit', '--output', 'out.bmp'],
     r'--output out.bmp is not allowed. .* \.html, \.png, \.pdf or \.svg\.$'),
    (['no.jpg', '--model', 'evo_test_vit', '--output', 'no/out.png'], 'there is no folder no'),
    (['no.jpg', '--model', 'evo_test_vit', '--output', 'out.png'], 'There is no image file no.jpg'),
    (['no.jpg', '--model', 'evo_test_vit', '--keep-ratios', '0.5', '--output', 'out.png'], 'is for a page'),
])
def test_the_command_refuses_before_any_work(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        cli.main(['visualize', *arguments])
    assert not list(tmp_path.iterdir())


KWARGS = [f'{key}={value}' for key, value in SMALL.items()]


def message(*args) -> str:
    """The error message of the command, which must be text without a traceback."""
    with pytest.raises(SystemExit) as error:
        cli.main([str(arg) for arg in args])
    text = error.value.code
    assert isinstance(text, str) and re.fullmatch('timm-evo: .{20,}', text)
    return text


def write(file: Path, content) -> None:
    """A file of these bytes, or what torch.save or safetensors write of anything else; a folder of None."""
    if content is None:
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif file.suffix == '.safetensors':
        save_file(content, file)
    else:
        torch.save(content, file)


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, 'w') as file:
        file.writestr('readme.txt', 'no weights')
    return content.getvalue()


@pytest.mark.parametrize('name, content, expected', [
    ('missing', ..., 'There is no checkpoint .*missing'),
    ('folder.pth', None, 'There is no checkpoint .*folder.pth'),
    ('empty.pth', b'', r'empty.pth cannot be read as a checkpoint: it is damaged or another kind of file \(EOFError\)'),
    ('empty.safetensors', b'', 'cannot be read as a checkpoint'),
    ('text.txt', b'hello garbage', 'cannot be read as a checkpoint'),
    ('noise.pth', b'\xff' * 100, 'was refused and no code in it was run'),
    ('noise.safetensors', b'\xff' * 100, 'cannot be read as a checkpoint'),
    ('archive.zip', zipped(), 'cannot be read as a checkpoint'),
    ('pickled.pth', pickle.dumps({'a': 1}), 'was refused and no code in it was run'),
    ('module.pth', torch.nn.Linear(2, 2), 'no code in it was run: .* other objects than weights .*Linear'),
    ('numbers.pth', {'epoch': {'loss': 1.}}, 'has no state dict, neither directly nor under the key state_dict_ema '),
    ('list.pth', [torch.zeros(1)], 'has no state dict'),
    ('nothing.pth', {'state_dict': {}}, 'has no state dict'),
    ('other.pth', {'layer.weight': torch.zeros(2)}, r'does not fit evo_vit_.*: missing: cls_token .* and \d+ more'),
    ('other.safetensors', {'layer.weight': torch.zeros(2)}, r'does not fit evo_vit_.*: missing: cls_token'),
])
def test_a_file_that_is_no_checkpoint_of_the_model_is_refused(name, content, expected, photo, tmp_path):
    photo.save(tmp_path / 'photo.png')
    if content is not ...:
        write(tmp_path / name, content)
    assert re.search(expected, message(
        'visualize', tmp_path / 'photo.png', '--model', 'evo_vit_tiny_patch16_224', '--checkpoint', tmp_path / name,
        '--output', tmp_path / 'out.html', '--model-kwargs', *KWARGS))
    assert not (tmp_path / 'out.html').exists()


def test_a_checkpoint_that_is_cut_off_or_of_other_classes_is_refused(photo, checkpoint, tmp_path):
    photo.save(tmp_path / 'photo.png')
    content, weights = checkpoint.read_bytes(), torch.load(checkpoint, weights_only=True)
    save_file(weights, tmp_path / 'model.safetensors')
    (tmp_path / 'cut.pth').write_bytes(content[:len(content) // 2])
    (tmp_path / 'cut.safetensors').write_bytes((tmp_path / 'model.safetensors').read_bytes()[:1000])
    torch.save(weights | {'head.weight': torch.zeros(7, 48), 'head.bias': torch.zeros(7)}, tmp_path / 'classes.pth')
    for name, expected in {
        'cut.pth': 'cannot be read as a checkpoint: it is damaged',
        'cut.safetensors': 'cannot be read as a checkpoint: it is damaged',
        'classes.pth': r'wrong shape: head.weight \(7, 48\), the model has \(1000, 48\); wrong shape: head.bias .*\)\.',
    }.items():
        assert re.search(expected, message(
            'visualize', tmp_path / 'photo.png', '--model', 'evo_vit_tiny_patch16_224', '--checkpoint', tmp_path / name,
            '--output', tmp_path / 'out.html', '--model-kwargs', *KWARGS))


@pytest.mark.parametrize('wrap', [
    lambda weights: {'state_dict': weights, 'args': argparse.Namespace(lr=0.1), 'epoch': 3},
    lambda weights: {'state_dict': {k: v * 0 for k, v in weights.items()}, 'state_dict_ema': weights},
    lambda weights: {f'module.{k}': v for k, v in weights.items()},
    lambda weights: {f'_orig_mod.{k}': v for k, v in weights.items()},
], ids=['training', 'averaged', 'data parallel', 'compiled'])
def test_checkpoints_as_timm_writes_them_are_loaded(wrap, tmp_path):
    model, other = create(), create()
    torch.save(wrap(model.state_dict()), tmp_path / 'checkpoint.pth.tar')
    checkpoints.load_weights(other, tmp_path / 'checkpoint.pth.tar')
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('argument, expected', [
    ('embed_dim=50', 'evo_vit_tiny_patch16_224 cannot be used with embed_dim=50. AssertionError: .* num_heads'),
    ('global_pool=x', "with global_pool='x'. AssertionError: .*avg"),
    ('pos_embed=x', "with pos_embed='x'. AssertionError: assert pos_embed in "),  # the assertion has no text
    ('img_size=10', 'with img_size=10. ValueError: There are no patch tokens'),
    ('img_size=()', r'with img_size=\(\). IndexError'),
    ('patch_size=0', 'with patch_size=0. ZeroDivisionError'),
    ('depth=0', 'with depth=0. '),
    ('depth=foo', "with depth='foo'. TypeError"),
    ('num_heads=-3', 'with num_heads=-3. RuntimeError'),  # which fails only when the model runs
    ('in_chans=0', 'with in_chans=0. RuntimeError'),
    ('norm_layer=foo', "with norm_layer='foo'. KeyError: 'foo'"),
    ('keep_raito=0.5', 'Did you mean keep_ratio'),
    ('keep_ratio=[]', r'with keep_ratio=\[\]. ValueError: keep_ratio=\[\] has 0 values'),
    ('pretrained=True', "with pretrained=True. TypeError: .* multiple values for .* 'pretrained'"),
    ('checkpoint_path=x', "with checkpoint_path='x'. TypeError"),
    (f'depth={100 * "("}', 'with depth='),
    ('depth={[]: 1}', 'with depth='),
])
def test_a_value_that_is_not_allowed_is_refused(argument, expected, photo, tmp_path):
    assert re.search(expected, message('info', 'evo_vit_tiny_patch16_224', '--model-kwargs', argument))
    photo.save(tmp_path / 'photo.png')
    assert re.search(expected, message(
        'visualize', tmp_path / 'photo.png', '--model', 'evo_vit_tiny_patch16_224', '--output', tmp_path / 'out.png',
        '--model-kwargs', argument))


def test_a_model_without_weights_is_not_drawn():
    with pytest.raises(ValueError, match='with device=.meta.* There are no weights on the meta device'):
        building.build('evo_test_vit', dict(device='meta'))


def test_names_of_models_are_refused(photo, tmp_path):
    photo.save(tmp_path / 'photo.png')
    (tmp_path / 'config.json').write_text('{}')
    for name, expected in {
        'evo_test_vti': 'timm has no model evo_test_vti. Did you mean evo_test_vit',
        'evo_test_vit.no_tag': 'evo_test_vit.no_tag cannot be used. .*no_tag',
        'resnet18': 'resnet18 cannot be used. TypeError: ResNet cannot be evolved',
        f'local-dir:{tmp_path}/no': 'FileNotFoundError: .*config.json',
        f'local-dir:{tmp_path}': "cannot be used. KeyError: 'architecture'",
        'evo_levit_cls_128s': 'cannot be loaded. RuntimeError: pretrained=True is not allowed',
    }.items():
        assert re.search(expected, message(
            'visualize', tmp_path / 'photo.png', '--model', name, '--output', tmp_path / 'out.png'))


def test_what_is_no_image_is_refused(photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo.save('photo.jpg')
    Path('cut.jpg').write_bytes(Path('photo.jpg').read_bytes()[:500])
    Path('text.jpg').write_text('no photo')
    Path('empty.png').touch()
    Path('folder.png').mkdir()
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    for name, expected in {
        'cut.jpg': 'cut.jpg cannot be read as an image. ',
        'text.jpg': 'text.jpg cannot be read as an image. UnidentifiedImageError',
        'empty.png': 'empty.png cannot be read as an image. UnidentifiedImageError',
        'photo.jpg': 'photo.jpg cannot be read as an image. DecompressionBombError',
        'folder.png': 'There is no image file folder.png',
    }.items():
        assert re.search(expected, message('visualize', name, '--model', 'evo_test_vit', '--output', 'out.html'))
    assert '--output folder.png is a folder' in message(
        'visualize', 'photo.jpg', '--model', 'evo_test_vit', '--output', 'folder.png')


@pytest.mark.parametrize('error', [RuntimeError, TypeError, KeyError, AttributeError, AssertionError])
def test_a_mistake_of_the_package_is_shown_as_one(error, photo, checkpoint, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error('a mistake')

    photo.save(tmp_path / 'photo.png')
    monkeypatch.setattr(visualization, 'trace', fail)
    with pytest.raises(error, match='a mistake'):
        cli.main([str(arg) for arg in (
            'visualize', tmp_path / 'photo.png', '--model', 'evo_vit_tiny_patch16_224', '--checkpoint', checkpoint,
            '--output', tmp_path / 'out.html', '--model-kwargs', *KWARGS)])


def test_a_picture_without_matplotlib_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(SystemExit, match='pip install matplotlib$'):
        cli.main(['visualize', 'no.jpg', '--model', 'evo_test_vit', '--output', str(tmp_path / 'out.png')])


@pytest.mark.parametrize('name', [
    'evo_deit_tiny_patch16_224', 'evo_levit_cls_128s', 'evo_vit_small_patch14_dinov2', 'evo_deit_small_patch16_384'])
def test_info_tells_what_a_model_is(name, capsys):
    cli.main(['info', name])
    text = capsys.readouterr().out
    model = timm.create_model(name).eval()
    image = torch.randn(1, *model.pretrained_cfg['input_size'])
    assert f'GMACs       {timm_evo.count_gmacs(model, image):.2f}, dense ' in text
    assert f'parameters  {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M' in text
    assert repr(model).splitlines()[1].strip() in text
    assert ('timm/' in text) == (not re.search('cls|384', name))


def test_info_counts_the_tokens_of_each_block(capsys):
    cli.main(['info', 'evo_deit_tiny_patch16_224', '--model-kwargs', 'keep_ratio=0.25', 'img_size=160'])
    assert re.findall(r'^  (\d.*?) +(\d+)$', capsys.readouterr().out, re.MULTILINE) == [
        ('0 to 3', '101'), ('4 to 11', '27')]  # 100 patches; 25, class token and representative token
    cli.main(['info', 'evo_deit_tiny_patch16_224', '--model-kwargs', 'features_only=True', 'img_size=160'])
    assert re.findall(r'^  (\d.*?) +(\d+)$', capsys.readouterr().out, re.MULTILINE) == [
        ('0 to 3', '101'), ('4 to 11', '52')]
    with pytest.raises(SystemExit, match='deit_tiny_patch16_224 is not an evolved model. Use evo_deit_tiny_patch'):
        cli.main(['info', 'deit_tiny_patch16_224'])


def test_the_command_tells_its_version(capsys):
    with pytest.raises(SystemExit, match='0'):
        cli.main(['--version'])
    assert capsys.readouterr().out.startswith(f'timm-evo {timm_evo.__version__}, timm {timm.__version__}, torch ')
