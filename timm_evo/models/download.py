""" Checks of weights from the Hugging Face Hub

timm and huggingface_hub download weights. huggingface_hub checks the size of a download over http, but not its
checksum, and the error for a damaged file does not say where the file is from. `verify_repo_checksums` of
huggingface_hub is not used, because it sends another request for all files of a repository, and needs a connection. In
the cache, the names of large files are their checksums.
"""
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils.sha import sha_fileobj
from timm.models import PretrainedCfg
from timm.models._hub import hf_split, load_state_dict_from_hf

from ..errors import reason


@contextmanager
def checked_weights(variant: str, cfg: PretrainedCfg, cache_dir: str | Path | None) -> Iterator[None]:
    """A context in which timm loads weights: damaged downloads are removed, and errors say what failed.

    Files that are downloaded inside the context are compared with their checksums, which takes a second or more per GB.
    Files that were in the cache before are compared only if they cannot be read. So damage is not found if it happens
    later and the file can still be read, or if the process of the download ended before the check.

    Args:
        variant: Name of the model.
        cfg: Its pretrained configuration. Nothing is checked if it has no repository of the Hub.
        cache_dir: Cache of huggingface_hub; None for its default.

    Raises:
        RuntimeError: The weights could not be loaded, or were damaged.
    """
    if not cfg.hf_hub_id or cfg.file or cfg.state_dict:
        yield
        return
    failed = f'The weights of {variant} could not be loaded from {cfg.hf_hub_id} on the Hugging Face Hub.'
    repo_folder = repo_folder_name(repo_id=hf_split(cfg.hf_hub_id)[0], repo_type='model')
    blobs = Path(cache_dir or constants.HF_HUB_CACHE, repo_folder, 'blobs').expanduser()
    cached = set(blobs.glob('*'))
    try:
        yield
    except Exception as error:
        if not any(frame.f_code is load_state_dict_from_hf.__code__ for frame, _ in walk_tb(error.__traceback__)):
            raise  # the error is not about the weights
        _refuse_damaged(failed, set(blobs.glob('*')))
        raise RuntimeError(
            f'{failed} {reason(error)} Check the connection, and your access to the repository (`hf auth login`). '
            'Weights in the cache need neither.') from error
    _refuse_damaged(failed, set(blobs.glob('*')) - cached)


def _refuse_damaged(failed: str, blobs: set[Path]) -> None:
    """Remove cached files that do not have the checksum the Hub gave for them, and raise if there are any."""
    weights = [blob for blob in blobs if re.fullmatch('[0-9a-f]{64}', blob.name) and blob.is_file()]
    damaged = [blob for blob in weights if _checksum(blob) != blob.name]
    for blob in damaged:
        blob.resolve().unlink()  # it may be a link to a file that repositories share
        blob.unlink(missing_ok=True)
    if damaged:
        raise RuntimeError(
            f'{failed} The download was damaged and was removed from the cache. Try again. If that does not help, the '
            'file on the Hub is damaged.')


def _checksum(file: Path) -> str:
    with file.open('rb') as content:
        return sha_fileobj(content).hex()
