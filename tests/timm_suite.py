"""pytest plugin: timm's own test suite for the evolved models and their dense twins.

timm's suite parametrises itself by `timm.list_models`, with lists of names and modules for what a family supports. This
plugin replaces `list_models`, so that every such list treats `evo_X` as it treats `X`, and selects the models that are
asked for. The suite itself is unchanged. `make timm-suite` runs it.

A case that does not pass for `evo_X` though it passes for `X` makes the run fail, a skipped one included.
"""
from collections import Counter, defaultdict
from fnmatch import fnmatch

import pytest
import timm

# Cases that load weights need the network of the Hub.
NEEDS_HUB = ('test_model_inference', 'test_model_load_pretrained', 'test_model_features_pretrained')
_CASE = 'model and case'

_timm_list_models = timm.list_models


def pytest_addoption(parser) -> None:
    parser.addoption('--timm-models', nargs='+', default=['evo_*'], help='names or wildcards of the models to test')


def pytest_configure(config) -> None:
    config.pluginmanager.register(Twins(), 'twins')

    def list_models(filter='', module='', exclude_filters='', **kwargs) -> list[str]:
        names = _timm_list_models(
            _with_evolved(filter),
            module=_with_registry(module),
            exclude_filters=_with_evolved(exclude_filters),
            **kwargs,
        )
        return [name for name in names if _is_wanted(name, config)]

    timm.list_models = list_models


def pytest_collection_modifyitems(config, items) -> None:
    def selected(item) -> bool:
        return item.originalname not in NEEDS_HUB and _is_wanted(_model_name(item), config)

    config.hook.pytest_deselected(items=[item for item in items if not selected(item)])
    items[:] = filter(selected, items)


class Twins:
    """Keeps the outcome of every case by model, and compares `evo_X` to `X`."""

    def __init__(self) -> None:
        self.outcomes = defaultdict(dict)  # model -> case -> outcome

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item):
        report = yield
        report.user_properties.append((_CASE, [_model_name(item), item.originalname]))
        return report

    def pytest_runtest_logreport(self, report) -> None:
        """Called in the process that has the summary, for the reports of all processes that run cases."""
        model, case = dict(report.user_properties).get(_CASE, (None, None))  # not there where its process crashed
        if model and (report.when == 'call' or report.outcome != 'passed'):
            self.outcomes[model][case] = report.outcome

    def behind_their_twin(self) -> list[str]:
        return [
            f'{case}: {model} {outcome}, {dense} passed'
            for model, cases in self.outcomes.items()
            if (dense := _dense_twin(model)) != model
            for case, outcome in cases.items()
            if outcome != 'passed' and self.outcomes.get(dense, {}).get(case) == 'passed'
        ]

    def pytest_sessionfinish(self, session) -> None:
        if self.behind_their_twin():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        terminalreporter.section("timm's suite by model")
        for model, cases in sorted(self.outcomes.items(), key=lambda entry: _dense_twin(entry[0])):
            counts = Counter(cases.values())
            terminalreporter.line(
                f'{model:40} {counts["passed"]:3} passed {counts["failed"]:3} failed {counts["skipped"]:3} skipped')
        for line in self.behind_their_twin():
            terminalreporter.line(line, red=True)


def _dense_twin(model: str) -> str:
    return model.removeprefix('evo_').replace('levit_cls_', 'levit_')


def _model_name(item) -> str | None:
    name = item.callspec.params.get('model_name') if hasattr(item, 'callspec') else None
    return name.split('.')[0] if isinstance(name, str) else None


def _is_wanted(model_name: str | None, config) -> bool:
    return model_name is not None and any(
        fnmatch(model_name.split('.')[0], pattern) for pattern in config.getoption('--timm-models'))


def _with_evolved(filters: str | list[str]) -> str | list[str]:
    return filters if isinstance(filters, str) else [*filters, *(f'evo_{name}' for name in filters)]


def _with_registry(modules: str | list[str]) -> str | list[str]:
    return [*modules, 'registry'] if 'deit' in modules else modules
