"""The page of `timm-evo visualize` in a real browser: sliders and pointer show what the page's data says.

Needs Chromium and its driver, as Debian's packages chromium and chromium-driver; skipped where they are not.
"""
import shutil

import pytest
import timm
import torch
from PIL import Image

from timm_evo import trace
from timm_evo.inspection import visualization

webdriver = pytest.importorskip('selenium.webdriver')
CHROMIUM, DRIVER = shutil.which('chromium'), shutil.which('chromedriver')
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason='there is no chromium with its driver')
SMALL = dict(img_size=48, patch_size=8, embed_dim=48, num_heads=3, depth=6)
KEEP_RATIOS = (0.6, 0.8, 1.0)


@pytest.fixture(scope='module')
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ('--headless=new', '--no-sandbox', '--disable-gpu', '--window-size=1100,900'):
        options.add_argument(argument)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(params=['evo_vit_tiny_patch16_224', 'evo_deit_tiny_patch16_224', 'evo_levit_128s'])
def page(request, browser, tmp_path):
    """A page that is open, and the model and the images that it shows."""
    torch.manual_seed(0)
    model = timm.create_model(request.param, **(dict(img_size=128) if 'levit' in request.param else SMALL)).eval()
    photo = Image.fromarray(torch.randint(0, 256, (48, 48, 3), dtype=torch.uint8).numpy())
    visualization.write_page(tmp_path / 'page.html', photo, model, KEEP_RATIOS)
    browser.get((tmp_path / 'page.html').as_uri())
    return model, visualization._prepare(photo, model)[0]


def move(browser, slider: str, value: int) -> None:
    browser.execute_script(
        'const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event("input"))',
        slider, value)


def text_of(browser, name: str) -> str:
    return browser.find_element('id', name).text


def brightness(browser, height: int, width: int) -> torch.Tensor:
    """Mean brightness of each patch in the left picture."""
    pixels = browser.execute_script(
        'const c = document.getElementById("kept");'
        'return Array.from(c.getContext("2d").getImageData(0, 0, c.width, c.height).data)')
    size = browser.execute_script('return [data.height, data.width]')
    image = torch.tensor(pixels, dtype=torch.float).view(*size, 4)[:, :, :3].mean(dim=2)
    return torch.nn.functional.adaptive_avg_pool2d(image[None], (height, width))[0]


def test_sliders_show_what_is_kept(page, browser):
    model, images = page
    depth, averages = visualization._count_blocks(model), model.evolution['selection'] == 'similarity'
    for i, keep_ratio in enumerate(KEEP_RATIOS):
        model.set_evolution(keep_ratio=keep_ratio)
        selections = trace(model, images)
        move(browser, 'ratio', i)
        assert text_of(browser, 'ratio-value') == str(keep_ratio).removesuffix('.0')
        for block in range(depth):
            move(browser, 'block', block)
            current = [selection for selection in selections if selection.block <= block]
            if not current:
                assert text_of(browser, 'state').startswith(f'Block {block}: all patches; ')
                continue
            slow = current[-1].slow[0]
            assert text_of(browser, 'state').startswith(
                f'Block {block}: {slow.numel()} patches as {slow.sum()} tokens, averaged before block '
                f'{current[-1].block}; ' if averages else
                f'Block {block}: {slow.sum()} of {slow.numel()} patches, selected before block {current[-1].block}; ')
            shown = brightness(browser, *slow.shape)
            if averages:  # no patch is dark
                assert shown.min() > 80
            else:
                assert shown[slow].min() > shown[~slow].max()  # the photo is noise of one mean brightness
            assert text_of(browser, 'kept-caption') == browser.execute_script('return data.legend')
    assert not [entry for entry in browser.get_log('browser') if entry['level'] == 'SEVERE']


def test_the_page_says_what_is_predicted_at_each_keep_ratio(page, browser):
    runs = browser.execute_script('return data.runs')
    for i, run in enumerate(runs):
        move(browser, 'ratio', i)
        dense, evolved = (row.text for row in browser.find_elements('css selector', '#prediction tr'))
        assert dense.startswith('dense ') and evolved.startswith(f'keep ratio {run["keep_ratio"]:g} ')
        assert evolved.endswith(', '.join(f'{name} {round(100 * share)}%' for name, share in run['prediction']))
    assert dense.removeprefix('dense ') == evolved.removeprefix('keep ratio 1 ')  # as every patch is kept


def test_the_pointer_says_what_a_patch_follows(page, browser):
    model, images = page
    model.set_evolution(keep_ratio=KEEP_RATIOS[0])
    selection = trace(model, images)[-1]
    move(browser, 'ratio', 0)
    move(browser, 'block', visualization._count_blocks(model) - 1)
    height, width = selection.slow.shape[1:]
    canvas = browser.find_element('id', 'kept')
    for slow in (True, False):
        row, column = (selection.slow[0] == slow).nonzero()[0].tolist()
        x, y = ((index + 0.5) / number - 0.5 for index, number in ((column, width), (row, height)))
        webdriver.ActionChains(browser).move_to_element_with_offset(
            canvas, round(x * canvas.size['width']), round(y * canvas.size['height'])).perform()
        follows = selection.follows[0, row, column].item()
        place = f'The patch in row {row}, column {column} '
        others = int((selection.follows == follows).sum()) - 1
        if follows >= 0 and others:
            expected = place + f'is averaged with {others} other'
        elif slow:
            expected = place + 'goes through the blocks'
        else:
            assert follows == -1
            expected = place + 'follows the representative token.'
        assert text_of(browser, 'hint').startswith(expected)
