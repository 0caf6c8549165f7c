"""Environment variables that must be set before any import"""
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')  # read when Triton is imported, which torch itself does late
