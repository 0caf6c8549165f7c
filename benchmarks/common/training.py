""" A training with timm's train.py in its own process, which can be interrupted and resumed """
import io
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pandas as pd
import yaml

from .results import replacing

LOG_TAIL = 25


@dataclass
class Training:
    """One variant with one seed.

    Attributes:
        label: Name of the variant.
        seed: Random seed.
        num_epochs: Number of epochs of the whole training.
        recipe: Everything that determines the result: options of train.py, and the description of the images.
        folder: Output folder of train.py.
    """
    label: str
    seed: int
    num_epochs: int
    recipe: dict
    folder: Path

    def summary(self) -> pd.DataFrame:
        """One row per epoch that train.py has finished, without an incomplete last line."""
        file = self.folder / 'summary.csv'
        text = file.read_text() if file.exists() else ''
        lines = text[:text.rfind('\n') + 1] or 'epoch,eval_top1\n'
        # a resumed train.py writes the header again, and perhaps an epoch whose checkpoint was lost
        rows = pd.read_csv(io.StringIO(lines), dtype=str, on_bad_lines='skip').apply(pd.to_numeric, errors='coerce')
        return rows.dropna(subset=['epoch', 'eval_top1']).drop_duplicates('epoch', keep='last').sort_values('epoch')

    def epochs_done(self) -> int:
        epochs = self.summary()['epoch']
        return int(epochs.iloc[-1]) + 1 if len(epochs) else 0

    def is_finished(self) -> bool:
        return self.epochs_done() == self.num_epochs

    def check_recipe(self) -> None:
        """Exit if the folder was made with another recipe; write the recipe to a new folder."""
        file = self.folder / 'recipe.yaml'
        if file.exists() or (self.folder / 'summary.csv').exists():
            before = yaml.safe_load(file.read_text()) if file.exists() else {}
            if before != self.recipe:
                raise SystemExit(
                    f'{self.folder} was made with another recipe. Use another --output or remove it:\n'
                    + '\n'.join(_differences(before, self.recipe)))
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            part.write_text(yaml.safe_dump(self.recipe))

    def run(self, script: Path, places: dict, lock: IO, report: Callable[[], None]) -> None:
        """Train until it is finished.

        Args:
            script: train.py.
            places: Options of train.py that are not in the recipe.
            lock: An open file that train.py keeps open, too.
            report: Function that is called every second.
        """
        options = {
            **self.recipe['options'], **places, 'output': str(self.folder.parent), 'experiment': self.folder.name}
        checkpoint = self.folder / 'last.pth.tar'
        if checkpoint.exists():
            options['resume'] = str(checkpoint)
        else:  # train.py would append to the file of a run that was interrupted in its first epoch
            (self.folder / 'summary.csv').unlink(missing_ok=True)
        config = self.folder / 'config.yaml'
        config.write_text(yaml.safe_dump(options))

        log_file = self.folder / 'train.log'
        with open(log_file, 'a') as log:
            process = subprocess.Popen(
                [sys.executable, script, '--config', config],
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
            )
            try:
                while process.poll() is None:
                    try:
                        process.wait(timeout=1)
                    except subprocess.TimeoutExpired:
                        report()
            finally:
                process.terminate()
                process.wait()
        report()
        # train.py also returns 0 when a signal has interrupted it
        if process.returncode != 0 or not self.is_finished():
            with open(log_file) as log:
                tail = ''.join(deque(log, maxlen=LOG_TAIL))
            raise SystemExit(
                f'\n{tail}\ntrain.py ended with exit status {process.returncode} after {self.epochs_done()} of '
                f'{self.num_epochs} epochs of {self.label}, seed {self.seed}. The text above is the end of {log_file}.')


def _differences(before: dict, now: dict, prefix: str = '') -> list[str]:
    lines = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f'{prefix}{key}.')
        elif old != new:
            lines.append(f'    {prefix}{key}: {old} before, {new} now')
    return lines
