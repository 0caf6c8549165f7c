""" The steps of `on_gpu.py`, one in a file """
