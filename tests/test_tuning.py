"""Settings that are fitted to a model, to images and to a machine."""
import json
import math

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import timm_evo
from timm_evo import cli
from timm_evo.method.schedule import make_similarity_schedule
from timm_evo.tuning.kept import Reference
from timm_evo.tuning.notes import Notes
from timm_evo.tuning.search import Space, find_best
from timm_evo.tuning.tune import _Tuning

DEPTH, NUM_PATCHES = 12, 196


def small_vit(**kwargs):
    """A ViT of as many blocks as most have, which runs in milliseconds."""
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        **{'img_size': 64, 'patch_size': 8, 'embed_dim': 32, 'num_heads': 2, 'num_classes': 10} | kwargs).eval()


@pytest.fixture(scope='module')
def images():
    torch.manual_seed(1)
    return nn.functional.interpolate(torch.randn(40, 3, 8, 8), size=64, mode='bilinear')


@pytest.fixture
def no_timing(monkeypatch):
    """Speed-ups are ratios of multiply-accumulates, because measured ones differ from run to run; a short search."""
    def speedups(self, schedules):
        dense = self._space.cost([1.] * self._space.depth)
        return [dense / self._space.cost(shares) for shares in schedules]
    monkeypatch.setattr(_Tuning, '_speedups', speedups)
    monkeypatch.setattr('timm_evo.tuning.tune._MOST_SCHEDULES', 12)


@pytest.mark.parametrize('wish', [{'speedup': 1.3}, {'keep_ratio': 0.6}, {'agreement': 0.7}])
def test_the_settings_go_into_evolve_and_cost_what_the_wish_allows(wish, images, no_timing):
    model = small_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = timm_evo.tune(model, images, **wish)

    assert type(model) is timm.models.VisionTransformer  # unchanged
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    found = tuned.rows[-1]
    assert found.setting == 'tuned'
    if 'speedup' in wish:
        assert math.isclose(found.speedup, 1.3, rel_tol=0.05)
    if 'keep_ratio' in wish:
        assert math.isclose(found.keep_ratio, 0.6, abs_tol=0.02)
    evolved = timm_evo.evolve(model, **tuned.settings)
    assert timm_evo.count_gmacs(evolved, images[:1]) == pytest.approx(found.gmacs)
    assert evolved.evolution_config == tuned.config
    created = timm.create_model('evo_vit_tiny_patch16_224', **tuned.settings)  # of as many blocks
    assert created.evolution_config == tuned.config


def test_the_settings_stay_with_a_model_that_is_saved(tmp_path):
    dense = timm.create_model('test_vit').eval()
    tuned = timm_evo.Tuned(
        dict(selection='similarity', keep_ratio=[0.8] + [0.6] * (len(dense.blocks) - 2), start_block=1), '', [], True)
    model = timm.create_model('evo_test_vit', **tuned.settings).eval()
    timm_evo.hub.save(model, tmp_path / 'model')
    loaded = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True).eval()
    assert loaded.evolution_config == tuned.config
    images = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(loaded(images), model(images))


def test_the_table_is_of_images_that_were_not_searched_on(images, no_timing):
    tuned = timm_evo.tune(small_vit(), images, keep_ratio=0.5)
    model = small_vit()
    with torch.no_grad():
        reference = Reference(model(images).double(), True, None)
        timm_evo.evolve(model, **tuned.settings)
        kept = reference.compare(model(images[1::2]), 1, 2)
    found = tuned.rows[-1]
    assert (found.agreement, found.error) == (kept.agreement, kept.error)
    assert found.loss == pytest.approx(kept.loss, abs=1e-6)


def test_the_tuned_schedule_loses_no_more_than_the_rule_where_it_was_searched(images, no_timing):
    losses = {}

    class Watched(_Tuning):
        def _kept(self, shares, part):
            kept = super()._kept(shares, part)
            losses[tuple(shares), part] = kept.log_loss
            return kept

    tuned = Watched(small_vit(), images, None, 16, False, None).meet('keep_ratio', 0.5)
    start = tuned.settings['start_block']
    found = (1.,) * start + tuple(tuned.settings['keep_ratio'])
    rule = tuple(make_similarity_schedule(DEPTH, 0.5, None).keep_ratio)
    assert losses[found, 0] <= losses[rule, 0]


def test_an_evolved_model_is_compared_with_the_dense_one_of_its_weights(images, no_timing):
    of_dense = timm_evo.tune(small_vit(), images, keep_ratio=0.5)
    model = timm_evo.evolve(small_vit(), selection='stage', keep_ratio=0.3)
    of_evolved = timm_evo.tune(model, images, keep_ratio=0.5)
    assert (of_evolved.settings, of_evolved.rows) == (of_dense.settings, of_dense.rows)
    assert of_dense.rows[0].gmacs == pytest.approx(timm_evo.count_gmacs(small_vit(), images[:1]))
    assert model.evolution['selection'] == 'stage'


def test_labels_give_top1_and_backbones_a_cosine(images, no_timing):
    labels = torch.arange(40) % 10
    batches = list(zip(images.split(8), labels.split(8), strict=True))  # as a DataLoader gives
    tuned = timm_evo.tune(small_vit(), batches, keep_ratio=0.5)
    with torch.no_grad():
        right = (small_vit()(images[1::2]).argmax(dim=1) == labels[1::2]).double().mean().item()
    assert tuned.rows[0].top1 == right
    assert 'top-1' in str(tuned)

    tuned = timm_evo.tune(small_vit(num_classes=0), images, labels, keep_ratio=0.5)
    assert not tuned.is_classifier
    assert tuned.rows[0].agreement == pytest.approx(1)
    assert 0 < tuned.rows[-1].agreement < 1
    assert 'cosine' in str(tuned)


def test_a_second_run_gives_the_same_and_measures_nothing(images, tmp_path, monkeypatch):
    file = tmp_path / 'tuned.json'
    monkeypatch.setattr('timm_evo.tuning.tune._MOST_SCHEDULES', 4)
    first = timm_evo.tune(small_vit(), images, keep_ratio=0.5, save=file)
    settings = json.loads(file.read_text()) if file.exists() else None
    assert settings == first.settings

    def refuse(*args):
        raise AssertionError('measured once more')
    monkeypatch.setattr(_Tuning, '_timed', refuse)
    monkeypatch.setattr(Reference, 'compare', refuse)
    second = timm_evo.tune(small_vit(), images, keep_ratio=0.5, save=file)
    assert (second.settings, second.rows) == (first.settings, first.rows)


def test_other_weights_or_images_are_measured_anew(images, tmp_path, no_timing):
    file = tmp_path / 'tuned.json'
    first = timm_evo.tune(small_vit(), images, keep_ratio=0.5, save=file)
    other = small_vit()
    nn.init.normal_(other.head.weight)
    assert timm_evo.tune(other, images, keep_ratio=0.5, save=file).rows[-1].loss != first.rows[-1].loss


def test_it_continues_where_it_was_interrupted(images, tmp_path, no_timing, monkeypatch):
    file = tmp_path / 'tuned.json'
    compare, calls = Reference.compare, []

    def counted(self, *args):
        calls.append(args)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return compare(self, *args)
    monkeypatch.setattr(Reference, 'compare', counted)
    with pytest.raises(KeyboardInterrupt):
        timm_evo.tune(small_vit(), images, keep_ratio=0.5, save=file)
    assert not file.exists()
    resumed = timm_evo.tune(small_vit(), images, keep_ratio=0.5, save=file)
    num_calls = len(calls) - 1
    calls[:] = [None] * 100
    whole = timm_evo.tune(small_vit(), images, keep_ratio=0.5, save=tmp_path / 'other.json')
    assert resumed.settings == whole.settings
    assert num_calls == len(calls) - 100  # nothing was measured twice


def test_where_nothing_meets_the_wish_there_are_no_settings(images, tmp_path, no_timing, monkeypatch):
    file = tmp_path / 'tuned.json'
    tuned = timm_evo.tune(small_vit(), images, speedup=50, save=file)
    assert tuned.settings is None and tuned.config is None and tuned.model_kwargs == ''
    assert 'No keep ratio meets 50 x' in tuned.message
    assert not file.exists()
    with pytest.raises(ValueError, match='No keep ratio meets 50 x'):
        tuned.save(file)

    monkeypatch.setattr(_Tuning, '_speedups', lambda self, schedules: [0.9] * len(schedules))
    tuned = timm_evo.tune(small_vit(), images, keep_ratio=0.5)
    assert tuned.settings is None and 'No keep ratio makes the model faster' in tuned.message


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(speedup=1), r'speedup=1 is not allowed. It must be a number above 1'),
    (dict(agreement=1.), r'agreement=1.0 is not allowed'),
    (dict(keep_ratio='half'), r"keep_ratio='half' is not allowed"),
    (dict(speedup=2, agreement=0.9), 'speedup and agreement are not allowed together'),
    (dict(batch_size=0), 'batch_size=0 is not allowed'),
    (dict(save='tuned.txt'), "save='tuned.txt' is not allowed. It must end with .json"),
    (dict(labels=torch.zeros(3)), r'labels of shape \(3,\) are not allowed. There must be one for each of 40 images'),
])
def test_what_is_not_allowed_is_refused_before_anything_is_measured(arguments, message, images, monkeypatch):
    monkeypatch.setattr(_Tuning, 'meet', None)
    with pytest.raises(ValueError, match=message):
        timm_evo.tune(small_vit(), images, **arguments)


@pytest.mark.parametrize(('spoil', 'message'), [
    (lambda images: images[:10], '10 different images are too few. There must be at least 32'),
    (lambda images: images[:1].expand(40, -1, -1, -1), '1 different images are too few'),
    (lambda images: torch.ones_like(images) * torch.rand(40, 3, 1, 1), '40 of 40 have only one colour'),
    (lambda images: images.byte(), 'must be .N, C, H, W. in floating point'),
    (lambda images: iter(()), '0 different images are too few'),
])
def test_images_without_information_are_refused(spoil, message, images):
    with pytest.raises(ValueError, match=message):
        timm_evo.tune(small_vit(), spoil(images))


def test_a_keep_ratio_that_is_too_small_is_refused_before_anything_is_measured(images, monkeypatch):
    monkeypatch.setattr(_Tuning, '_kept', None)
    with pytest.raises(ValueError, match='keep_ratio=0.001 is not allowed .* It must be at least'):
        timm_evo.tune(small_vit(), images, keep_ratio=0.001)


def test_levit_and_other_models_say_why_they_cannot_be_tuned(images):
    with pytest.raises(ValueError, match='not allowed for LeViT'):
        timm_evo.tune(timm.create_model('levit_128s', num_classes=10), images)
    with pytest.raises(TypeError, match='Linear cannot be evolved'):
        timm_evo.tune(nn.Linear(2, 2), images)


def test_notes_of_another_kind_are_not_read_and_broken_ones_are_named(tmp_path):
    file = tmp_path / 'a.measured.json'
    assert Notes(file, {'images': 'a'}).get('x', lambda: (1, 2)) == [1, 2]
    assert Notes(file, {'images': 'a'}).get('x', lambda: 3) == [1, 2]
    assert Notes(file, {'images': 'b'}).get('x', lambda: 3) == 3
    file.write_text('{"identity"')
    with pytest.raises(ValueError, match='a.measured.json is not JSON'):
        Notes(file, {'images': 'a'})


@pytest.mark.parametrize('shares', [[1.] * 12, [1.] * 3 + [0.8, 0.6] + [0.4] * 7])
def test_the_cost_is_that_of_the_blocks_but_the_last(shares):
    model = timm_evo.evolve(timm.create_model('vit_tiny_patch16_224', num_classes=0).eval(), selection='similarity')
    gmacs = []
    for of_blocks in (shares, [1.] * 12):
        model.set_evolution(keep_ratio=of_blocks[1:], start_block=1)
        gmacs.append(timm_evo.count_gmacs(model, torch.zeros(1, 3, 224, 224)))
    space = Space(DEPTH, NUM_PATCHES, 1, 192, True)
    ratio = space.cost(shares) / space.cost([1.] * 12)
    assert gmacs[0] / gmacs[1] == pytest.approx(ratio, abs=0.03)  # patch embedding and the last block beside


@pytest.mark.parametrize('keep_ratio', [0.9, 0.7, 0.5, 0.35])
def test_all_schedules_that_are_tried_cost_the_same(keep_ratio):
    space = Space(DEPTH, NUM_PATCHES, 1, 192, True)
    cost = space.cost(space.rule(keep_ratio))
    rule = space.weights_of(space.rule(keep_ratio))
    tried = [found for weights in space.neighbours(rule) if (found := space.shares_of(weights, cost)) is not None]
    assert len(tried) > 5
    for shares in tried:
        assert space.cost(shares) == pytest.approx(cost, rel=0.02)  # whole tokens, in eights with the class token
        make_similarity_schedule(DEPTH, shares[1:], 1)  # which refuses what similarity cannot do


def test_the_search_finds_the_schedule_that_loses_least():
    """Of a loss whose best schedule is known, and three moves away from where the search begins."""
    space = Space(DEPTH, NUM_PATCHES, 1, 192, True)
    best = (0, 0, 0, 0, 4, 0, 4, 0, 4, 0, 0, 0)
    cost = space.cost(space.rule(0.7))
    goal = space.shares_of(best, cost)

    def loss(shares):
        return sum((share - wanted) ** 2 for share, wanted in zip(shares, goal, strict=True))

    found = find_best(space, cost, [(0, 4, 0, 4, 0, 4, 0, 0, 0, 0, 0, 0)], loss, 500)
    assert found == best


def test_the_command_prints_a_table_and_writes_settings_and_with_matplotlib_the_curve(
        tmp_path, capsys, no_timing, monkeypatch):
    torch.manual_seed(0)
    for i in range(40):
        folder = tmp_path / 'images' / f'class{i % 2}'
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((200, 180)).save(folder / f'{i}.png')
    file = tmp_path / 'tuned.json'
    arguments = [
        'tune', 'vit_tiny_patch16_224', '--images', str(tmp_path / 'images'), '--checkpoint',
        str(weights(tmp_path)), '--model-kwargs', 'num_classes=2', 'img_size=64', '--keep-ratio', '0.5', '--save',
        str(file)]
    cli.main(arguments)
    printed = capsys.readouterr().out
    assert 'tuned' in printed and 'top-1' in printed
    settings = json.loads(file.read_text())
    line = next(line for line in printed.splitlines() if line.startswith('--model-kwargs '))
    assert dict(map(cli.key_value, line.split()[1:])) == settings  # as timm's scripts read them
    assert Image.open(tmp_path / 'tuned.png').size[0] > 100

    (tmp_path / 'tuned.png').unlink()
    monkeypatch.setattr(cli, 'find_spec', lambda name: None)  # as if matplotlib were not installed
    cli.main(arguments)
    assert json.loads(file.read_text()) == settings and not (tmp_path / 'tuned.png').exists()


def weights(folder):
    torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', num_classes=2, img_size=64)
    torch.save(model.state_dict(), folder / 'weights.pth')
    return folder / 'weights.pth'


def test_the_command_names_a_folder_without_images(tmp_path):
    with pytest.raises(SystemExit, match='timm-evo: --images .*nowhere cannot be read: there is no such folder'):
        cli.main(['tune', 'test_vit2', '--images', str(tmp_path / 'nowhere'), '--checkpoint', str(tiny(tmp_path))])
    with pytest.raises(SystemExit, match='timm-evo: --images .*: RuntimeError: Found 0 images'):
        cli.main(['tune', 'test_vit2', '--images', str(tmp_path), '--checkpoint', str(tiny(tmp_path))])


def test_the_command_names_what_is_not_there_before_any_work(tmp_path):
    with pytest.raises(SystemExit, match='timm-evo: --device mars is not available. RuntimeError: '):
        cli.main(['tune', 'no_model', '--images', str(tmp_path), '--device', 'mars'])
    with pytest.raises(SystemExit, match='timm-evo: --plot a.txt is not allowed. It must end with .png'):
        cli.main(['tune', 'no_model', '--images', str(tmp_path), '--plot', 'a.txt'])
    with pytest.raises(SystemExit, match='timm-evo: --plot .*b.png cannot be written: there is no folder .*nowhere'):
        cli.main(['tune', 'no_model', '--images', str(tmp_path), '--plot', str(tmp_path / 'nowhere' / 'b.png')])
    with pytest.raises(SystemExit, match='timm-evo: --save .*c.json is a folder'):
        (tmp_path / 'c.json').mkdir()
        cli.main(['tune', 'no_model', '--images', str(tmp_path), '--save', str(tmp_path / 'c.json')])


def test_an_interrupted_command_says_how_it_continues(tmp_path, monkeypatch):
    monkeypatch.setattr('timm_evo.tuning.folder.load_images', lambda *args: (torch.zeros(1), None))

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr('timm_evo.tuning.tune.tune', interrupt)
    with pytest.raises(SystemExit, match='timm-evo was interrupted. The same command continues.'):
        cli.main([
            'tune', 'test_vit2', '--images', str(tmp_path), '--checkpoint', str(tiny(tmp_path)), '--save',
            str(tmp_path / 'a.json')])


def tiny(folder):
    torch.save(timm.create_model('test_vit2').state_dict(), folder / 'tiny.pth')
    return folder / 'tiny.pth'
