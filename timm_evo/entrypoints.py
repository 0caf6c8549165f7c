""" Import this to register the models, and to have raised what would only be warned of

They are registered in `models.registry` while timm is being imported, by the thread that does so. What `registry`
imports must not import timm on its own: a thread that is at that, holding the lock of a module, and waits for timm
would be waited for by the thread that imports timm. Python then goes on with the module half done, and without the
models.
"""
import timm  # noqa: F401  # before the module that it imports

from .models.registry import *  # noqa: F403
