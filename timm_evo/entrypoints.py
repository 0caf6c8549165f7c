""" Registration of the models, in which errors are raised and not only shown as warnings

The thread that imports timm also imports `models.registry`, which registers the models. Modules that `registry` imports
must not import timm: another thread could hold the lock of such a module and wait for timm, while the thread that
imports timm waits for that lock. Python ends such a deadlock with a partly initialized module, and the models would be
missing.
"""
import timm  # noqa: F401  # before `registry`, which the import of timm imports

from .models.registry import *  # noqa: F403
