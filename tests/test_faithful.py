"""The authors' implementation, reproduced: outputs and gradients of small models run with their code."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from timm_evo import EvoLevit, EvoVisionTransformer
from timm_evo.checkpoints import from_official

REFERENCE = Path(__file__).parent / 'reference'
FILES = ['evo_deit_a', 'evo_deit_b']
LEVIT_FILES = ['evo_levit_a', 'evo_levit_b']
MODES = ['stage', 'layer']
LEVIT_MODES = ['stage.learned', 'stage.fixed', 'layer.learned', 'layer.fixed']
LEVIT_HEADS = ['head', 'head_dist', 'head_cls', 'head_cls_dist']


class Reference:
    """One file of the authors' inputs, weights and outputs."""

    def __init__(self, name: str) -> None:
        with safe_open(REFERENCE / f'{name}.safetensors', 'pt') as file:
            self.config = file.metadata()
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def model(self, mode: str, class_head: bool) -> EvoVisionTransformer:
        model = EvoVisionTransformer(
            **{k: int(self.config[k]) for k in ('img_size', 'patch_size', 'num_classes')},
            **{k: int(self.config[k]) for k in ('embed_dim', 'depth', 'num_heads')},
            global_pool='avg',
            keep_ratio=float(self.config['keep_ratio']),
            tradeoff=json.loads(self.config['tradeoff']),
            selection=mode,
            fast_update=False,
            class_head=class_head,
        )
        model.load_state_dict(from_official(self.group('state.'), class_head=class_head), strict=True)
        return model

    def levit(self, mode: str, class_head: bool) -> EvoLevit:
        selection, tradeoff = mode.split('.')
        learn_tradeoff = tradeoff == 'learned'
        model = EvoLevit(
            **{k: int(self.config[k]) for k in ('img_size', 'num_classes', 'key_dim')},
            **{k: json.loads(self.config[k]) for k in ('embed_dim', 'depth', 'num_heads')},
            start_block=int(self.config['dense_blocks']),
            keep_ratio=float(self.config['keep_ratio']),
            selection=selection,
            learn_tradeoff=learn_tradeoff,
            class_token=True,
            class_head=class_head,
        )
        state_dict = from_official(self.group('state.'), class_head=class_head, learn_tradeoff=learn_tradeoff)
        model.load_state_dict(state_dict, strict=True)
        return model

    def levit_logits(self, model: EvoLevit) -> dict[str, torch.Tensor]:
        features = model.forward_features(self['input'])
        patches, class_token = features[:, 1:].mean(dim=1), features[:, 0]
        return {
            name: model.get_submodule(name)(class_token if 'cls' in name else patches) for name in LEVIT_HEADS}


@pytest.fixture(params=FILES)
def reference(request):
    return Reference(request.param)


@pytest.mark.parametrize('mode', MODES)
def test_inference_logits_are_the_authors(reference, mode):
    model = reference.model(mode, class_head=False).eval()
    with torch.no_grad():
        logits = model(reference['input'])
    torch.testing.assert_close(logits, reference[f'eval.{mode}.logits'], rtol=0, atol=1e-4)


@pytest.mark.parametrize('mode', MODES)
def test_training_logits_of_both_heads_are_the_authors(reference, mode):
    model = reference.model(mode, class_head=True).train()
    model.set_distilled_training(True)
    logits_avg, logits_cls = model(reference['input'])
    torch.testing.assert_close(logits_avg, reference[f'train.{mode}.logits_avg'], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits_cls, reference[f'train.{mode}.logits_cls'], rtol=0, atol=1e-4)


@pytest.mark.parametrize('mode', MODES)
def test_gradients_are_the_authors(mode):
    reference = Reference('evo_deit_a')
    model = reference.model(mode, class_head=True).train()
    model.set_distilled_training(True)
    losses = [F.cross_entropy(logits, reference['target']) for logits in model(reference['input'])]
    loss = sum(losses) / 2
    loss.backward()
    torch.testing.assert_close(loss, reference[f'train.{mode}.loss'], rtol=0, atol=1e-4)

    expected = from_official(reference.group(f'grad.{mode}.'))
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=0, atol=1e-4 * grad.abs().max().item(), msg=name)


@pytest.mark.parametrize('name', FILES)
def test_two_heads_average_their_logits(name):
    reference = Reference(name)
    model = reference.model('stage', class_head=True).train()
    expected = (reference['train.stage.logits_avg'] + reference['train.stage.logits_cls']) / 2
    torch.testing.assert_close(model(reference['input']), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.eval()(reference['input']), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize('mode', LEVIT_MODES)
@pytest.mark.parametrize('name', LEVIT_FILES)
@torch.no_grad()
def test_levit_inference_logits_are_the_authors(name, mode):
    reference = Reference(name)
    logits = reference.levit(mode, class_head=False).eval()(reference['input'])
    torch.testing.assert_close(logits, reference[f'eval.{mode}.logits'], rtol=0, atol=1e-4)


@pytest.mark.parametrize('mode', ['stage.learned', 'layer.fixed'])  # those the authors train in
@pytest.mark.parametrize('name', LEVIT_FILES)
def test_levit_training_logits_of_all_heads_are_the_authors(name, mode):
    reference = Reference(name)
    model = reference.levit(mode, class_head=True).train()
    logits = reference.levit_logits(model)
    for head in LEVIT_HEADS:
        torch.testing.assert_close(logits[head], reference[f'train.{mode}.{head}'], rtol=0, atol=1e-4)
    model = reference.levit(mode, class_head=True).train()
    model.set_distilled_training(True)
    for out, head in zip(model(reference['input']), ['head', 'head_dist'], strict=True):
        expected = (logits[head] + logits[head.replace('head', 'head_cls')]) / 2
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('mode', ['stage.learned', 'layer.fixed'])
def test_levit_gradients_are_the_authors(mode):
    reference = Reference('evo_levit_a')
    model = reference.levit(mode, class_head=True).train()
    loss = sum(
        F.cross_entropy(logits, reference['teacher_target' if 'dist' in head else 'target']) / 4
        for head, logits in reference.levit_logits(model).items()
    )
    loss.backward()
    torch.testing.assert_close(loss, reference[f'train.{mode}.loss'], rtol=0, atol=1e-4)

    expected = from_official(reference.group(f'grad.{mode}.'))
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert actual.keys() == expected.keys()
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        # a batch norm behind a bias takes the bias back out: its gradient is nothing but rounding
        scale = max(grad.abs().max().item(), 2e-4 * largest)
        torch.testing.assert_close(actual[name], grad, rtol=0, atol=1e-3 * scale, msg=name)


def test_a_state_dict_of_another_model_is_refused():
    with pytest.raises(ValueError, match='qks.0.qk.weight'):
        from_official({'cls_token': torch.zeros(1)})
