""" Exported files as functions of images, and their times side by side """
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .measuring import NUM_WARMUP

THREADS = 2
RUNTIMES = ('onnxruntime', 'OpenVINO')
Run = Callable[[Tensor], Tensor]


def load_file(file: Path, runtime: str) -> Run:
    """A file of ONNX or, in OpenVINO, also of its own format."""
    if runtime == 'onnxruntime':
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        # or threads that wait for more work would take the cores from the file that is timed next
        options.add_session_config_entry('session.force_spinning_stop', '1')
        session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
        return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])
    import openvino
    # float32, because OpenVINO would use lower precision on some processors
    config = {'INFERENCE_NUM_THREADS': THREADS, 'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'}
    compiled = openvino.compile_model(file, 'CPU', config)
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])


@torch.inference_mode()
def time_in_turn(run: Mapping[str, Run], images: Tensor, rounds: int, name: str) -> dict[str, list[float]]:
    """Seconds per batch in each round, by label.

    Args:
        run: What is timed, by label.
        images: The batch (B, 3, H, W).
        rounds: Timed batches of each.
        name: What the progress bar says.
    """
    seconds: dict[str, list[float]] = {label: [] for label in run}
    for i in tqdm(range(NUM_WARMUP + rounds), desc=name, unit='round'):
        for label in run if i % 2 == 0 else reversed(run):
            start = time.perf_counter()
            run[label](images)
            if i >= NUM_WARMUP:
                seconds[label].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: Mapping[str, list[float]], of: str, to: str) -> float:
    """Median of the ratios within each round; larger ratios are faster."""
    return statistics.median(b / a for a, b in zip(seconds[of], seconds[to], strict=True))
