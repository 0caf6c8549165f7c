""" Search for the settings of selection by similarity that keep most of a model """
