""" Jobs for the processes of a step, and processes with a time limit """
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
POLL = 0.3  # seconds between two checks of running processes
TAIL = 1500  # last characters of a process's output


@dataclass
class Job:
    """The work of a process of a step.

    Attributes:
        run: Name of the run, for its records.
        results: File of records.
        profiles: File of profiles.
        folder: Folder for temporary files.
        device: Name of the device.
        quick: Whether it is only tried at tiny sizes.
        settings: Settings to time.
        variant: Variant to compile.
        clones: The authors' code of other methods, by variant.
        more: Other values for a step.
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
    """A command that runs in the background, with all processes that it starts.

    Args:
        command: Arguments of Python.
        log: File for its output.
        env: Changes of the environment; None removes a variable.
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
        """Exit status; None while the process runs."""
        return self.process.poll()

    def said(self) -> str:
        """The end of its output."""
        return self.log.read_text(errors='replace')[-TAIL:]

    def wait(self, seconds: float) -> int | None:
        """Exit status; None if the time runs out first."""
        try:
            return self.process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """Stop it and all processes that it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            if self.wait(SECONDS_TO_END) is not None and number == signal.SIGTERM:
                time.sleep(0.1)  # processes that it has started may take longer to end
        self.process.wait()


def run_job(
        job: Job,
        step: str,
        module: str,
        seconds: float,
        report: Callable[[], None],
        env: dict[str, str | None] | None = None,
) -> None:
    """Run a module of this folder in its own process. Record a failure, and also if the time is over."""
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
