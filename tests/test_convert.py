"""`timm-evo convert`: from a checkpoint of the authors to a folder that timm loads, or one error that says why not."""
import argparse
import json
import os
import re
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_faithful import Reference
from this_torch import load_folder

from timm_evo import checkpoints, cli, hub

MODELS = {
    'evo_deit_a': 'evo_deit_tiny_patch16_224',
    'evo_deit_b': 'evo_deit_small_patch16_224',
    'evo_levit_a': 'evo_levit_cls_128s',
    'evo_levit_b': 'evo_levit_cls_256',
}
DIMENSIONS = {'deit': ['img_size', 'patch_size', 'embed_dim', 'depth', 'num_heads', 'tradeoff', 'keep_ratio'],
              'levit': ['img_size', 'embed_dim', 'key_dim', 'depth', 'num_heads']}
# how scripts store weights: a function of the weights, and the options that find them
FORMS = {
    'bare': (lambda weights: weights, []),
    'model': (lambda weights: {'model': weights}, []),
    'args': (lambda weights: {'model': weights, 'epoch': 3, 'args': argparse.Namespace(lr=0.1, opt=['adamw'])}, []),
    'ema alone': (lambda weights: {'model_ema': weights}, []),
    'ema beside': (
        lambda weights: {'model': {k: v * 0 for k, v in weights.items()}, 'model_ema': weights}, ['--use-ema']),
    'not the ema': (
        lambda weights: {'model': weights, 'model_ema': {k: v * 0 for k, v in weights.items()}}, []),
    'data parallel': (lambda weights: {f'module.{k}': v for k, v in weights.items()}, []),
}


def model_kwargs(reference: Reference) -> list[str]:
    """Dimensions of the small model, as the command takes them."""
    return ['--model-kwargs', *(f'{k}={reference.config[k]}' for k in DIMENSIONS[reference.config['family']])]


def convert(file, folder, name: str, *options) -> None:
    cli.main(['convert', str(file), '--model', MODELS[name], '--output', str(folder), *options])


@pytest.fixture
def deit(tmp_path) -> Reference:
    """A reference whose weights are in `checkpoint.pth`."""
    reference = Reference('evo_deit_a')
    torch.save({'model': reference.group('state.')}, tmp_path / 'checkpoint.pth')
    return reference


def message(*args) -> str:
    """The error message of the command, which must be one message without a traceback."""
    with pytest.raises(SystemExit) as error:
        cli.main([str(arg) for arg in args])
    assert isinstance(error.value.code, str)
    return error.value.code


@pytest.mark.parametrize('name, form', [
    *((name, form) for name in ('evo_deit_a', 'evo_levit_a') for form in FORMS),
    ('evo_deit_b', 'model'),
    ('evo_levit_b', 'model'),
])
@torch.no_grad()
def test_a_converted_model_gives_the_logits_of_the_authors(name, form, tmp_path):
    reference = Reference(name)
    wrap, options = FORMS[form]
    torch.save(wrap(reference.group('state.')), tmp_path / 'checkpoint.pth')
    convert(tmp_path / 'checkpoint.pth', tmp_path / 'model', name, *model_kwargs(reference), *options)

    model = load_folder(tmp_path / 'model').eval()
    mode = 'stage' if 'deit' in name else 'stage.learned'
    torch.testing.assert_close(model(reference['input']), reference[f'eval.{mode}.logits'], rtol=0, atol=1e-4)


@torch.no_grad()
def test_safetensors_and_another_mode(tmp_path):
    reference = Reference('evo_levit_a')
    # safetensors has no two names for one tensor
    save_file({k: v.clone() for k, v in reference.group('state.').items()}, tmp_path / 'official.safetensors')
    convert(tmp_path / 'official.safetensors', tmp_path / 'model', 'evo_levit_a', *model_kwargs(reference),
            'selection=layer', 'learn_tradeoff=False')
    model = load_folder(tmp_path / 'model').eval()
    torch.testing.assert_close(model(reference['input']), reference['eval.layer.fixed.logits'], rtol=0, atol=1e-4)


def test_the_folder_has_weights_config_and_card(deit, tmp_path, capsys):
    convert(tmp_path / 'checkpoint.pth', tmp_path / 'model', 'evo_deit_a', *model_kwargs(deit))
    assert sorted(path.name for path in (tmp_path / 'model').iterdir()) == [
        'README.md', 'config.json', 'model.safetensors']
    config = json.loads((tmp_path / 'model' / 'config.json').read_text())
    assert config['architecture'] == MODELS['evo_deit_a'] and config['num_classes'] == 7
    assert {k: config['model_args'][k] for k in ('global_pool', 'fast_update', 'depth')} == {
        'global_pool': 'avg', 'fast_update': False, 'depth': 12}
    card = (tmp_path / 'model' / 'README.md').read_text()
    for part in ('0.5 at 4, 0.5 at 8', 'GMACs', 'other tokens: no', "timm.create_model('local-dir:model'", 'xu2022evo'):
        assert part in card
    assert f"timm.create_model('local-dir:{tmp_path / 'model'}', pretrained=True)" in capsys.readouterr().out


def test_the_card_counts_the_work_of_the_model():
    cards = [
        hub.model_card(timm.create_model(name, keep_ratio=ratio), 'x')['details']['Model Stats']
        for name in ('evo_deit_tiny_patch16_224', 'evo_levit_128s') for ratio in (0.5, 1.0)
    ]
    gmacs = [float(card['GMACs']) for card in cards]
    assert gmacs == pytest.approx([0.774, 1.152, 0.249, 0.305], abs=1e-3)  # the dense DeiT-T with a short last block


def test_a_folder_is_replaced_by_force_alone(deit, tmp_path):
    command = ['convert', tmp_path / 'checkpoint.pth', '--model', MODELS['evo_deit_a'], '--output', tmp_path / 'model',
               *model_kwargs(deit)]
    cli.main([str(part) for part in command])
    written = (tmp_path / 'model' / 'config.json').stat().st_mtime_ns
    assert 'Use force=True (--force) to replace it' in message(*command)
    assert (tmp_path / 'model' / 'config.json').stat().st_mtime_ns == written
    cli.main([str(part) for part in [*command, '--force']])
    assert (tmp_path / 'model' / 'config.json').stat().st_mtime_ns > written
    (tmp_path / 'model' / 'thesis.tex').write_text('years of work')
    assert 'thesis.tex' in message(*command, '--force')
    assert (tmp_path / 'model' / 'thesis.tex').exists()


def test_a_failure_leaves_nothing_half_written(deit, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError('No space left on device')

    monkeypatch.setattr(hub, 'generate_readme', fail)
    assert 'No space left' in message(
        'convert', tmp_path / 'checkpoint.pth', '--model', MODELS['evo_deit_a'], '--output', tmp_path / 'model',
        *model_kwargs(deit))
    assert [path.name for path in tmp_path.iterdir()] == ['checkpoint.pth']


class Malicious:
    """Runs a command where it is unpickled."""

    def __init__(self, trace) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize('place', ['weights', 'args'])
def test_pickled_code_is_not_run(place, tmp_path):
    weights = Reference('evo_deit_a').group('state.')
    malicious = Malicious(tmp_path / 'trace')
    torch.save({'model': weights | {'x': malicious}} if place == 'weights' else {'model': weights, 'args': malicious},
               tmp_path / 'checkpoint.pth')
    error = message('convert', tmp_path / 'checkpoint.pth', '--model', MODELS['evo_deit_a'], '--output', tmp_path / 'm')
    assert 'no code in it was run' in error and 'mkdir' in error
    assert [path.name for path in tmp_path.iterdir()] == ['checkpoint.pth']


@pytest.mark.parametrize('change, lines', [
    (lambda weights: weights.pop('norm.bias'), ['missing: fc_norm.bias (24,)']),
    (lambda weights: weights.update(extra=torch.zeros(2)), ['surplus: extra (2,)']),
    (lambda weights: weights.update({'norm.weight': torch.zeros(5), 'more': torch.zeros(1)}),
     ['wrong shape: fc_norm.weight (5,), the model has (24,)', 'surplus: more (1,)']),
])
def test_every_misfit_is_listed(change, lines, deit, tmp_path):
    weights = deit.group('state.')
    change(weights)
    torch.save(weights, tmp_path / 'checkpoint.pth')
    error = message('convert', tmp_path / 'checkpoint.pth', '--model', MODELS['evo_deit_a'], '--output', tmp_path / 'm',
                    *model_kwargs(deit))
    assert sorted(line.strip() for line in error.splitlines()[1:]) == sorted(lines)
    assert not (tmp_path / 'm').exists()


@pytest.mark.parametrize('model, expected', [
    ('evo_levit_cls_256', 'is an official Evo-DeiT, so the model cannot be evo_levit_cls_256'),
    ('deit_tiny_patch16_224', 'the model cannot be deit_tiny_patch16_224'),
    ('evo_deit_huge', 'the model cannot be evo_deit_huge. It can be one of: evo_deit_base_patch16_224, '),
    ('evo_deit_tiny_distilled_patch16_224', 'It can be one of: evo_deit_base_patch16_224, evo_deit_base_patch16_384, '
                                            'evo_deit_small_patch16_224, '),
    ('evo_deit_base_patch16_224', 'wrong shape: cls_token (1, 1, 24), the model has (1, 1, 768)'),
])
def test_another_architecture(model, expected, deit, tmp_path):
    assert expected in message('convert', tmp_path / 'checkpoint.pth', '--model', model, '--output', tmp_path / 'm')


@pytest.mark.parametrize('argument, expected', [
    ('foo=1', 'has no argument foo. Its arguments are: act_layer, '),
    ('model_name=abc', 'has no argument model_name. Its arguments are: '),
    ('use_ema=True', 'has no argument use_ema. Its arguments are: '),
    ('pretrained=True', 'has no argument pretrained. Its arguments are: '),
    ('=1', 'has no argument . Its arguments are: '),
    ('learn_tradeoff=True', 'has no argument learn_tradeoff. Its arguments are: '),
    ('num_heads=5', r'num_heads=5. AssertionError: \w+ should be divisible by num_heads'),
    ('num_heads=0', 'num_heads=0. ZeroDivisionError'),
    ('num_heads=-3', 'num_heads=-3. RuntimeError'),  # which fails only when the model runs
    ('img_size=0', 'cannot be used with img_size=0. '),
    ('global_pool=foo', "global_pool='foo'. AssertionError: .*avg.*map"),
    ('drop_rate=[0.5', r"drop_rate='\[0.5'. TypeError"),
    ('drop_rate=a=b', "drop_rate='a=b'. TypeError"),
    ('keep_ratio=2', 'keep_ratio=2. ValueError: keep_ratio=2 is not allowed. It must be a number in'),
    ('depth=None', 'wrong shape: '),  # as if it were not there
])
def test_an_argument_that_the_model_does_not_take(argument, expected, deit, tmp_path):
    error = message('convert', tmp_path / 'checkpoint.pth', '--model', MODELS['evo_deit_a'], '--output', tmp_path / 'm',
                    '--model-kwargs', argument)
    assert re.search(expected, error)
    assert not (tmp_path / 'm').exists()


@pytest.mark.parametrize('name, change, expected', [
    ('evo_deit_a', lambda weights: weights.pop('vs.3.v.weight'), 'missing: blocks.3.attn.qkv.weight'),
    ('evo_deit_a', lambda weights: weights.pop('qks.3.qk.bias'), 'surplus: vs.3.v.bias'),
    ('evo_deit_a', lambda weights: weights.update({'vs.3.v.weight': torch.zeros(24, 5)}),
     'missing: blocks.3.attn.qkv.weight'),
    ('evo_deit_a', lambda weights: weights.update({'head.weight': torch.tensor(1.)}), r'wrong shape: head.weight \(\)'),
    ('evo_deit_a', lambda weights: weights.update({3: torch.zeros(1)}), 'has no state dict'),
    ('evo_levit_a', lambda weights: weights.update({'blocks.x.y': torch.zeros(1)}), 'surplus: blocks.x.y'),
    ('evo_levit_a', lambda weights: weights.update({'blocks.3': torch.zeros(1)}), 'surplus: blocks.3 '),
    ('evo_levit_a', lambda weights: weights.pop('blocks.1.m2.m.0.c.weight'),
     'missing: stages.0.blocks.1.mlp.ln1.linear.weight'),
])
def test_entries_that_are_missing_or_have_other_names(name, change, expected, tmp_path):
    reference = Reference(name)
    weights = reference.group('state.')
    change(weights)
    torch.save(weights, tmp_path / 'checkpoint.pth')
    error = message('convert', tmp_path / 'checkpoint.pth', '--model', MODELS[name], '--output', tmp_path / 'm',
                    *model_kwargs(reference))
    assert re.search(expected, error)
    assert not (tmp_path / 'm').exists()


@pytest.mark.parametrize('content, expected', [
    (None, 'There is no checkpoint'),
    (b'', 'cannot be read as a checkpoint: it is damaged or another kind of file (EOFError).'),
    (b'hello garbage', 'cannot be read as a checkpoint'),
    (b'PK\5\6' + bytes(18), 'is not a checkpoint'),  # an empty zip file
    (b'not a checkpoint at all', 'is not a checkpoint'),
    ({'epoch': 3}, 'has no state dict'),
    ({'model': {}}, 'has no state dict'),
    ({'model': timm.create_model('test_vit').state_dict()}, 'This is not the state dict of an official Evo-ViT'),
])
def test_other_files(content, expected, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / 'checkpoint.pth').write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / 'checkpoint.pth')
    assert expected in message(
        'convert', tmp_path / 'checkpoint.pth', '--model', MODELS['evo_deit_a'], '--output', tmp_path / 'm')


def test_a_truncated_file(deit, tmp_path):
    content = (tmp_path / 'checkpoint.pth').read_bytes()
    (tmp_path / 'checkpoint.pth').write_bytes(content[:len(content) // 2])
    with pytest.raises(ValueError, match='cannot be read as a checkpoint'):
        checkpoints.read_official(tmp_path / 'checkpoint.pth')


def test_the_command_is_installed_and_explains_itself():
    command = [os.path.join(os.path.dirname(sys.executable), 'timm-evo')]
    for options, part in (([], 'convert'), (['convert'], '--model-kwargs')):
        result = subprocess.run([*command, *options, '--help'], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0 and part in result.stdout and not result.stderr
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and 'COMMAND' in result.stderr
