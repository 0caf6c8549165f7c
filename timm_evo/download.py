""" Weights from the Hugging Face Hub, checked and explained

timm and huggingface_hub do the downloading. huggingface_hub compares the size of what comes over http with what was
announced, not its checksum, and the readers of a damaged file don't know where it is from.
"""
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils.sha import sha_fileobj
from timm.models import PretrainedCfg
from timm.models._hub import hf_split

# What building a model raises. Everything else, and any OSError, comes from loading weights.
_BUILD_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def checked_weights(variant: str, cfg: PretrainedCfg, cache_dir: str | Path | None) -> Iterator[None]:
    """Around timm's loading of weights: leave none in the cache that are damaged, and say what failed.

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
    try:
        yield
    except Exception as error:
        if isinstance(error, _BUILD_ERRORS) and not isinstance(error, OSError):
            raise
        _refuse_damaged(failed, cfg.hf_hub_id, cache_dir)
        raise RuntimeError(
            f'{failed} {type(error).__name__}: {error} Check the connection, and whether you have access to the '
            'repository (`hf auth login`); what is in the cache is used without both.') from error
    _refuse_damaged(failed, cfg.hf_hub_id, cache_dir)


def _refuse_damaged(failed: str, hub_id: str, cache_dir: str | Path | None) -> None:
    """Remove cached weights that do not have the checksum the Hub gave for them, and raise."""
    repo_id, revision = hf_split(hub_id)
    for filename in ('model.safetensors', 'pytorch_model.bin'):
        file = try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision)
        if not isinstance(file, str):
            continue
        blob = Path(file).resolve()  # named by its checksum, where the system has symbolic links
        if not re.fullmatch('[0-9a-f]{64}', blob.name):
            continue
        with blob.open('rb') as content:
            checksum = sha_fileobj(content).hex()
        if checksum != blob.name:
            Path(file).unlink()
            blob.unlink(missing_ok=True)
            raise RuntimeError(
                f'{failed} {filename} was damaged, and was removed from the cache. Try again; if that does not help, '
                'it is damaged on the Hub.')
