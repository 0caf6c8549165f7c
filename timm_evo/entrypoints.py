""" Import this to register the models with errors raised, not only warned of

The thread that imports timm also imports `models.registry`, which registers the models. Modules that `registry` imports
must not import timm: another thread could hold the lock of such a module and wait for timm, while the thread that
imports timm waits for that lock. Python resolves such a deadlock by a partly initialized module, and the models would
be missing.
"""
import timm  # noqa: F401  # before `registry`, which the import of timm imports

from .models.registry import *  # noqa: F403
