""" timm's models, evolved """
