""" What takes part in training alone """
