""" Settings of similarity that are fitted to a model, to images and to a machine """
