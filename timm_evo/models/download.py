""" Weights from the Hugging Face Hub, checked and explained

timm and huggingface_hub do the downloading. huggingface_hub compares the size of what comes over http with what was
announced, not its checksum, and the readers of a damaged file don't know where it is from. Its `verify_repo_checksums`
is not used: it asks the Hub once more, for all files of a repository, and says nothing where there is no connection,
while the cache names large files by their checksums.
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
    """Around timm's building of a model and loading of weights: leave no damaged download, and say what failed.

    What was downloaded inside this context is compared with its checksum, which takes a second or more per GB. What was
    in the cache before is not, until it cannot be read. So damage that comes later and leaves a file readable is not
    found, nor is that of a download whose process ended before it was checked.

    Args:
        variant: Name of the model.
        cfg: Its pretrained configuration; nothing is done where that has no repository of the Hub.
        cache_dir: Cache of huggingface_hub, its own default if None.

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
            raise  # it is about the model
        _refuse_damaged(failed, set(blobs.glob('*')))
        raise RuntimeError(
            f'{failed} {reason(error)} Check the connection, and whether you have access to the '
            'repository (`hf auth login`); what is in the cache is used without both.') from error
    _refuse_damaged(failed, set(blobs.glob('*')) - cached)


def _refuse_damaged(failed: str, blobs: set[Path]) -> None:
    """Remove cached files that do not have the checksum the Hub gave for them, and raise if there are any."""
    weights = [blob for blob in blobs if re.fullmatch('[0-9a-f]{64}', blob.name) and blob.is_file()]
    damaged = [blob for blob in weights if _checksum(blob) != blob.name]
    for blob in damaged:
        blob.resolve().unlink()  # it may be a link to where repositories share files
        blob.unlink(missing_ok=True)
    if damaged:
        raise RuntimeError(
            f'{failed} What was downloaded was damaged, and was removed from the cache. Try again; if that does not '
            'help, it is damaged on the Hub.')


def _checksum(file: Path) -> str:
    with file.open('rb') as content:
        return sha_fileobj(content).hex()
