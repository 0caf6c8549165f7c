""" What a process of a step is told, and processes that end when their time is over """
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import records
from .settings import Setting

ROOT = Path(__file__).parents[2]
SECONDS_TO_END = 5
POLL = 0.3  # seconds between two looks at what runs
TAIL = 1500  # letters of what a process has said


@dataclass
class Job:
    """What a process of a step does.

    Attributes:
        run: Name of the run, which its records bear.
        results: File of records.
        profiles: File of profiles.
        folder: For what is forgotten afterwards.
        device: Name of the device.
        quick: Whether to try it at tiny sizes.
        settings: What to time.
        variant: The one to compile.
        clones: The authors' code of other methods, by variant.
        more: What else a step has to know.
    """
    run: str
    results: str
    profiles: str
    folder: str
    device: str
    quick: bool
    settings: list[Setting] = field(default_factory=list)
    variant: str = ''
    clones: dict[str, str] = field(default_factory=dict)
    more: dict = field(default_factory=dict)

    @staticmethod
    def from_text(text: str) -> 'Job':
        values = json.loads(text)
        return Job(**values | {'settings': [Setting.from_dict(each) for each in values['settings']]})

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    def record(self, kind: str, **values) -> None:
        records.append(Path(self.results), {'kind': kind, 'run': self.run, **values})

    def failed(self, step: str, what: str, error: BaseException | str) -> None:
        said = error if isinstance(error, str) else f'{type(error).__name__}: {error}'
        self.record('failure', step=step, what=what, error=said[-TAIL:])


class Process:
    """A command that runs beside, with all processes that it starts.

    Args:
        command: Arguments of Python.
        log: What it says goes there.
        env: Changes of the environment; None takes a variable away.
    """

    def __init__(self, command: list, log: Path, env: dict[str, str | None] | None = None) -> None:
        paths = [str(ROOT), str(ROOT / 'benchmarks'), os.environ.get('PYTHONPATH', '')]
        changed: dict = {
            **os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths)), 'PYTHONUNBUFFERED': '1', **(env or {})}
        self.log = log
        with log.open('w') as stream:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command)], stdout=stream, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
                env={key: value for key, value in changed.items() if value is not None})

    def status(self) -> int | None:
        """Exit status, None while it runs."""
        return self.process.poll()

    def said(self) -> str:
        """The end of what it has written."""
        return self.log.read_text(errors='replace')[-TAIL:]

    def wait(self, seconds: float) -> int | None:
        """Exit status; None if the time runs out first."""
        try:
            return self.process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """End it, and whatever it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            if self.wait(SECONDS_TO_END) is not None and number == signal.SIGTERM:
                time.sleep(0.1)  # what it has started may need another moment
        self.process.wait()


def run_job(
        job: Job,
        step: str,
        module: str,
        seconds: float,
        report: Callable[[], None],
        env: dict[str, str | None] | None = None,
) -> None:
    """Run a module of this folder in a process of its own; note if it fails, or if its time runs out."""
    process = Process(['-m', f'gpu.{module}', job.to_text()], Path(job.folder) / f'{module}.log', env)
    end = time.monotonic() + seconds
    try:
        while process.status() is None and time.monotonic() < end:
            report()
            time.sleep(POLL)
        status = process.status()
    finally:
        process.stop()
    if status is None:
        job.failed(step, 'all that is missing', f'stopped after {seconds:.0f} s')
    elif status != 0:
        job.failed(step, 'all that is missing', process.said())
