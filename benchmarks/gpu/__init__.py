""" The steps of `on_gpu.py` """
