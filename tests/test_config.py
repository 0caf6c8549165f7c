"""Each argument of evolution is declared once, and everything that takes or shows arguments follows."""
import dataclasses
import inspect
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm

import timm_evo
from timm_evo import EvolutionConfig

NAMES = [field.name for field in dataclasses.fields(EvolutionConfig)]


@pytest.mark.parametrize('arguments, message', [
    (dict(keep_ratio=0), r'keep_ratio=0 is not allowed. It must be a number in \(0, 1\]'),
    (dict(keep_ratio=[0.5, 1.5]), 'keep_ratio=1.5 is not allowed'),
    (dict(keep_ratio=float('nan')), 'keep_ratio=nan is not allowed'),
    (dict(keep_ratio=None), 'keep_ratio=None is not allowed'),
    (dict(tradeoff=-0.1), r'tradeoff=-0.1 is not allowed. It must be a number in \[0, 1\]'),
    (dict(stage_depth=0), 'stage_depth=0 is not allowed. It must be a whole number of at least 1'),
    (dict(learn_tradeoff='false'), "learn_tradeoff='false' is not allowed. It must be True or False"),
    (dict(learn_tradeoff=True, tradeoff=1.0), r'tradeoff=1.0 is not allowed with learn_tradeoff=True. .* \(0, 1\)'),
    (dict(layerwise_updates=-1), 'layerwise_updates=-1 is not allowed'),
    (dict(selection='layer', layerwise_updates=1), "layerwise_updates=1 is not allowed with selection='layer'"),
    (dict(selection='similarity', tradeoff=0.5), "tradeoff=0.5 is not allowed with selection='similarity'"),
    (dict(selection='similarity', fast_update=False), "fast_update=False is not allowed with selection='similarity'"),
])
def test_what_no_model_could_have_is_refused_without_a_model(arguments, message):
    with pytest.raises(ValueError, match=message):
        EvolutionConfig(**arguments)


def test_the_configuration_has_plain_numbers_and_cannot_be_changed():
    config = EvolutionConfig(keep_ratio=np.array([0.7, 0.5]), start_block=np.int64(3))
    assert config == EvolutionConfig(keep_ratio=[0.7, 0.5], start_block=3)
    assert type(config.keep_ratio) is list and type(config.start_block) is int
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.keep_ratio = 0.5


@pytest.mark.parametrize('function', [timm_evo.evolve, timm_evo.evolved])
def test_help_shows_each_argument(function):
    first, *others = inspect.signature(function).parameters.values()
    assert first.name == 'model' and [parameter.name for parameter in others] == NAMES
    assert {parameter.name: parameter.default for parameter in others}['keep_ratio'] == 0.5


def test_help_shows_what_can_change_at_run_time():
    signature = inspect.signature(timm_evo.EvoVisionTransformer.set_evolution)
    assert set(NAMES) - set(signature.parameters) == {'class_head', 'class_token', 'learn_tradeoff'}
    assert 'keep_ratio: float | collections.abc.Sequence[float] = unchanged' in str(signature)
    with pytest.raises(ValueError, match='selection=None is not known'):
        timm.create_model('evo_deit_tiny_patch16_224', embed_dim=24, num_heads=2).set_evolution(selection=None)


@pytest.mark.parametrize('name, defaults', [
    ('evo_test_vit', dict(selection='similarity')),
    ('evo_deit_tiny_patch16_224', dict(selection='stage')),
    ('evo_levit_cls_128s', dict(selection='stage', class_token=True, learn_tradeoff=True)),
])
def test_a_model_shows_its_arguments(name, defaults):
    model = timm.create_model(name, keep_ratio=0.7, start_block=2)
    assert model.evolution_config == EvolutionConfig(keep_ratio=0.7, start_block=2, **defaults)
    model.set_evolution(keep_ratio=0.6, start_block=None)
    assert model.evolution_config == EvolutionConfig(keep_ratio=0.6, **defaults)
    assert model.evolution.items() <= dataclasses.asdict(model.evolution_config).items()


def test_the_page_on_models_lists_each_argument():
    page = (Path(__file__).parents[1] / 'docs/models.md').read_text()
    assert {name for name in NAMES if f'\n| `{name}` |' in page} == set(NAMES)
