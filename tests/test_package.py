"""The package in an editor, a type checker and a package index; public names and errors."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from this_torch import library
from torch import nn

import timm_evo

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
URLS = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['urls']


def test_public_names_are_listed_and_there():
    assert set(timm_evo.__all__) <= set(dir(timm_evo))
    assert all(getattr(timm_evo, name) is not None for name in timm_evo.__all__)
    assert callable(timm_evo.hub.save) and callable(timm_evo.checkpoints.from_official)
    with pytest.raises(AttributeError, match='has no attribute'):
        timm_evo.no_such_name  # noqa: B018


def test_public_modules_are_there_without_another_import():
    code = 'import timm_evo; print(timm_evo.hub.save.__name__, timm_evo.checkpoints.load_official.__name__)'
    assert subprocess.check_output([sys.executable, '-c', code], text=True).split() == ['save', 'load_official']


@pytest.mark.parametrize('call, name', [
    ('timm_evo.evolve(', 'keep_ratio'),
    ('timm_evo.evolve(', 'layerwise_updates'),
    ('timm_evo.trace(', 'images'),
    ('timm_evo.EvoVisionTransformer().set_evolution(', 'tradeoff'),
])
def test_an_editor_knows_the_arguments(call, name):
    jedi = pytest.importorskip('jedi')
    signatures = jedi.Script(f'import timm_evo\n{call}').get_signatures()
    assert name in [parameter.name for signature in signatures for parameter in signature.params]


def test_an_editor_completes_the_names():
    jedi = pytest.importorskip('jedi')
    names = [completion.name for completion in jedi.Script('import timm_evo\ntimm_evo.').complete()]
    assert set(timm_evo.__all__) <= set(names)
    # beside them it finds every file of the package, and what PyTorch's entry point calls
    files = {path.stem for path in (ROOT / 'timm_evo').iterdir()}
    others = {name for name in names if not name.startswith('_')} - set(timm_evo.__all__) - files
    assert others <= {'TYPE_CHECKING', 'autoload'}


def test_a_notebook_and_a_prompt_complete_the_public_names_alone():
    assert sorted(dir(timm_evo)) == sorted([*timm_evo.__all__, '__version__'])
    jedi = pytest.importorskip('jedi')
    names = [completion.name for completion in jedi.Interpreter('timm_evo.', [{'timm_evo': timm_evo}]).complete()]
    assert sorted(name for name in names if not name.startswith('_')) == sorted(timm_evo.__all__)


def test_the_representation_of_a_model_shows_its_settings():
    model = timm.create_model('evo_test_vit', keep_ratio=0.7)
    assert repr(model).startswith("EvoVisionTransformer(\n  keep_ratio=0.7, selection='similarity', fast_update=True, ")
    model.set_evolution(keep_ratio=0.4, selection='stage', tradeoff=0.3)
    assert "keep_ratio=0.4, selection='stage', tradeoff=0.3" in repr(model)
    assert 'keep_ratio' not in repr(timm_evo.restore(model))


# The README, which a package index shows without the files beside it


def readme_without_code() -> str:
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    return re.sub(r'^```.*?^```$|`[^`\n]+`', '', text, flags=re.MULTILINE | re.DOTALL)


def test_links_and_pictures_of_the_readme_are_whole_addresses():
    text = readme_without_code()
    targets = re.findall(r'\]\(([^)\s]+)', text) + re.findall(r'(?:src|srcset|href)="([^"]*)"', text)
    assert targets
    assert not [target for target in targets if not target.startswith('https://')]


def test_a_package_index_shows_all_of_the_readme():
    markdown = pytest.importorskip('readme_renderer.markdown')
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    html = markdown.render(text)
    if html is None:
        pytest.skip('readme_renderer was installed without its renderer of markdown')
    prose = readme_without_code()
    assert html.count('<img ') == len(re.findall(r'!\[|<img ', prose)) > 0
    assert html.count('<h2') == len(re.findall('^## ', prose, flags=re.MULTILINE)) > 0
    assert html.count('<table') == len(re.findall(r'^\|[ :|-]+\|$', prose, flags=re.MULTILINE))
    assert html.count('<pre') == len(re.findall('^```.*?^```$', text, flags=re.MULTILINE | re.DOTALL)) > 0
    assert set(re.findall(r'(?:href|src)="([^"]*)"', html)) >= set(re.findall(r'\]\((https://[^)\s]+)', prose))
    assert '<!--' not in html and '&lt;' not in re.sub('<pre.*?</pre>|<code.*?</code>', '', html, flags=re.DOTALL)


def test_what_repeats_the_addresses_of_pyproject_agrees():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert (citation['url'], citation['repository-code']) == (URLS['Documentation'], URLS['Repository'])
    settings = (ROOT / 'mkdocs.yml').read_text()  # which has tags that YAML alone does not know
    for name, url in (('site_url', 'Documentation'), ('repo_url', 'Repository')):
        assert f'\n{name}: {URLS[url]}\n' in settings
    repository = URLS['Repository'].removeprefix('https://github.com/')
    owner, name = repository.split('/')
    for file in ('README.md', 'CHANGELOG.md', 'CONTRIBUTING.md'):
        text = (ROOT / file).read_text(encoding='utf-8')
        for found in re.findall(rf'https://(?:raw\.githubusercontent|github)\.com/([\w-]+/{name})\b', text):
            assert found == repository
        assert set(re.findall(rf'https://[\w-]+\.github\.io/{name}/', text)) <= {URLS['Documentation']}
    assert URLS['Documentation'] == f'https://{owner}.github.io/{name}/'


def test_the_version_has_an_entry_in_the_changelog_and_the_citation():
    changelog = (ROOT / 'CHANGELOG.md').read_text()
    version, date = re.search(r'^## \[(\d[^]]*)\] - (\d{4}-\d\d-\d\d)$', changelog, flags=re.MULTILINE).groups()
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert version == timm_evo.__version__ == citation['version']
    assert date == str(citation['date-released'])
    assert f'\n[{version}]: {URLS["Repository"]}/releases/tag/v{version}\n' in changelog


# `evolved`


@pytest.mark.parametrize('name', ['test_vit', 'levit_128s'])
def test_a_dense_model_is_evolved_only_within_the_context(name):
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh branches of LeViT add nothing
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    images = torch.randn(2, *model.pretrained_cfg['input_size'])
    before, cls = model(images), type(model)
    with timm_evo.evolved(model, keep_ratio=0.7) as evolved:
        assert evolved is model and model.evolution['keep_ratio'] == 0.7
        assert not torch.equal(model(images), before)
    assert type(model) is cls and torch.equal(model(images), before)
    with pytest.raises(KeyError), timm_evo.evolved(model):
        raise KeyError
    assert type(model) is cls


def test_an_evolved_model_has_other_arguments_only_within_the_context():
    model = timm.create_model('evo_test_vit', keep_ratio=0.5).eval()
    images, saved = torch.randn(2, 3, 160, 160), getattr(model, '_model_args', None)
    before, settings = model(images), dict(model.evolution)
    with timm_evo.evolved(model, keep_ratio=1.0):
        assert not torch.equal(model(images), before)
    assert model.evolution == settings and torch.equal(model(images), before)
    assert getattr(model, '_model_args', None) == saved
    with pytest.raises(ValueError, match='keep_ratio=2'), timm_evo.evolved(model, keep_ratio=2):
        pass
    assert model.evolution == settings


# Errors


class TwoDeep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({'vit': timm.create_model('test_vit')})


def test_an_error_says_why_a_model_cannot_be_evolved():
    with pytest.raises(TypeError, match="evolve takes a model, not its name 'vit_base_patch16_224'"):
        timm_evo.evolve('vit_base_patch16_224')
    with pytest.raises(TypeError, match=r'evolve takes a model \(torch.nn.Module\), not an object of class dict'):
        timm_evo.evolve({})
    with pytest.raises(TypeError, match=r'TwoDeep cannot be evolved, but its submodule `.encoder.vit` \(VisionT'):
        timm_evo.evolve(TwoDeep())
    backbone = timm.create_model('test_vit', features_only=True)
    with pytest.raises(TypeError, match=r'FeatureGetterNet cannot be evolved, but its submodule `.model` \('):
        timm_evo.evolve(backbone)
    with pytest.raises(TypeError, match=r'OptimizedModule .* `._orig_mod` \(.* Evolve that one, before it is wr'):
        timm_evo.evolve(torch.compile(timm.create_model('test_vit')))
    with pytest.raises(TypeError, match='Sequential has a submodule `.0` that is evolved already'):
        timm_evo.evolve(nn.Sequential(timm.create_model('evo_test_vit')))


def test_models_of_other_libraries_are_named():
    from torchvision.models import VisionTransformer
    vit = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)
    with pytest.raises(TypeError, match="it is a model of torchvision, and only timm's models can be evolved"):
        timm_evo.evolve(vit)
    transformers = library('transformers', 'modeling_utils')
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(TypeError, match='it is a model of transformers'):
        timm_evo.evolve(transformers.ViTModel(config))


def test_restore_says_where_the_evolved_model_is():
    compiled = torch.compile(timm.create_model('evo_test_vit'))
    with pytest.raises(TypeError, match='OptimizedModule is not evolved. Its submodule `._orig_mod` is evolved. R'):
        timm_evo.restore(compiled)
    with pytest.raises(TypeError, match='dict is not evolved.'):
        timm_evo.restore({})


def test_the_nearest_name_of_a_misspelt_argument_is_named():
    vit, levit = timm.create_model('test_vit'), timm.create_model('levit_128s')
    evolved = timm.create_model('evo_test_vit')
    for call in (
            lambda: timm_evo.evolve(vit, keep_raito=0.5), lambda: timm_evo.evolve(levit, keep_raito=0.5),
            lambda: evolved.set_evolution(keep_raito=0.5), lambda: timm.create_model('evo_test_vit', keep_raito=0.5),
            lambda: timm.create_model('evo_levit_128s', keep_raito=0.5)):
        with pytest.raises(TypeError, match=r'keep_raito is not an argument of .* Did you mean keep_ratio\?'):
            call()
    assert type(vit) is timm.models.VisionTransformer
    with pytest.raises(TypeError, match='nonsense is not an argument of .* Its arguments are class_head, fast_'):
        timm_evo.evolve(vit, nonsense=1)


def test_an_error_says_why_a_family_does_not_have_an_argument():
    levit = timm.create_model('levit_128s')
    for call in (
            lambda: timm_evo.evolve(levit, stage_depth=2), lambda: timm.create_model('evo_levit_128s', stage_depth=2),
            lambda: timm.create_model('evo_levit_128s').set_evolution(stage_depth=2)):
        with pytest.raises(TypeError, match='stage_depth is not an argument of .* because each of its stages is a seg'):
            call()
    for call in (
            lambda: timm_evo.evolve(timm.create_model('test_vit'), learn_tradeoff=True),
            lambda: timm.create_model('evo_test_vit', learn_tradeoff=True)):
        with pytest.raises(TypeError, match='learn_tradeoff is not an argument of .* because only a LeViT learns'):
            call()


def test_defaults_are_those_of_the_family():
    vit = timm_evo.evolve(timm.create_model('test_vit', depth=12))
    assert vit.evolution['selection'] == 'similarity' and vit.schedule.begins[3]
    levit = timm_evo.evolve(timm.create_model('levit_128s'))
    assert levit.evolution['selection'] == 'stage'
    assert levit.schedule == timm.create_model('evo_levit_128s', start_block=2, tradeoff=0.5).schedule
    with pytest.raises(ValueError, match='fast_update=1 is not allowed'):
        timm_evo.evolve(timm.create_model('test_vit'), fast_update=1)
