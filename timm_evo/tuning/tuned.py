""" The result of tuning: settings, table and curve """
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import EvolutionConfig
from ..inspection.visualization import figure_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['Row', 'Tuned']


@dataclass(frozen=True)
class Row:
    """One row of the table, measured on the images that the search did not use.

    Attributes:
        setting: 'dense', 'rule' for a keep ratio as one number, or 'tuned'.
        keep_ratio: The keep ratio that has the same cost by the rule.
        gmacs: Multiply-accumulates for one image, in billions.
        speedup: Measured speed-up over the dense model.
        agreement: Share of the images that get the class of the dense model. For a backbone, the cosine of its
            features.
        error: Standard error of `agreement`.
        loss: Kullback-Leibler divergence from the dense predictions in nats. For a backbone, one minus the cosine.
        top1: Share of the images that get their label, if there are labels.
    """
    setting: str
    keep_ratio: float
    gmacs: float
    speedup: float
    agreement: float
    error: float
    loss: float
    top1: float | None = None


@dataclass(frozen=True)
class Tuned:
    """The result of `tune`.

    Attributes:
        settings: Arguments for `evolve`, `set_evolution` or `timm.create_model('evo_*')`; None if no schedule meets the
            wish.
        message: How the wish is met, or why it is not met.
        rows: Rows of the table.
        is_classifier: Whether `agreement` is that of classes, and not of features.
    """
    settings: dict[str, Any] | None
    message: str
    rows: Sequence[Row]
    is_classifier: bool

    @property
    def config(self) -> EvolutionConfig | None:
        """The settings with all defaults."""
        return None if self.settings is None else EvolutionConfig(**self.settings)

    @property
    def model_kwargs(self) -> str:
        """The settings as timm's scripts take them after `--model-kwargs`; empty if there are none."""
        return ' '.join(f'{name}={json.dumps(value, separators=(",", ":")) if isinstance(value, list) else value}'
                        for name, value in (self.settings or {}).items())

    def __str__(self) -> str:
        """The table, with the message below it."""
        has_top1 = any(row.top1 is not None for row in self.rows)
        titles = ['setting', 'GMACs', 'speed-up', 'same class' if self.is_classifier else 'cosine',
                  'KL' if self.is_classifier else '1 - cosine', *(['top-1'] if has_top1 else [])]
        lines = [titles]
        for row in self.rows:
            name = row.setting if row.setting == 'dense' else f'{row.setting} {row.keep_ratio:.2f}'
            agreement = f'{row.agreement:.1%} ± {row.error:.1%}' if self.is_classifier else (
                f'{row.agreement:.4f} ± {row.error:.4f}')
            lines.append([name, f'{row.gmacs:.3f}', f'{row.speedup:.2f} x', agreement, f'{row.loss:.4f}',
                          *([f'{row.top1:.1%}'] if row.top1 is not None else [])])
        widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
        table = ['  '.join(cell.rjust(width) if i else cell.ljust(width)
                           for i, (cell, width) in enumerate(zip(line, widths, strict=True))) for line in lines]
        return '\n'.join([*table, '', self.message])

    def draw(self) -> 'Figure':
        """Draw agreement against speed-up.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure = figure_class()(figsize=(5.5, 4), layout='constrained')
        axis = figure.subplots()
        rule = sorted((row for row in self.rows if row.setting != 'tuned'), key=lambda row: row.speedup)
        tuned = [row for row in self.rows if row.setting == 'tuned']
        for name, rows, style in (('one keep ratio', rule, 'C0o-'), ('tuned', tuned, 'C3D')):
            axis.errorbar([row.speedup for row in rows], [row.agreement for row in rows],
                          [row.error for row in rows], fmt=style, capsize=3, label=name)
        for row in rule:
            if row.setting == 'rule' and row.keep_ratio == round(row.keep_ratio, 1):  # not that beside the tuned one
                axis.annotate(f'{row.keep_ratio:g}', (row.speedup, row.agreement), xytext=(4, 6),
                              textcoords='offset points', fontsize=8)
        axis.set(xlabel='speed-up over the dense model', ylabel='share of images that get the same class'
                 if self.is_classifier else 'cosine to the dense features')
        axis.margins(x=0.08)  # room for the last label
        axis.grid(alpha=0.3)
        axis.legend()
        return figure

    def save(self, file: str | Path) -> None:
        """Write the settings as JSON: `evolve(model, **json.load(open(file)))`.

        Raises:
            ValueError: There are no settings, because no schedule meets the wish.
        """
        if self.settings is None:
            raise ValueError(f'There are no settings to save. {self.message}')
        Path(file).write_text(json.dumps(self.settings, indent=2) + '\n', encoding='utf-8')
