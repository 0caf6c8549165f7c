""" Inspection of evolved models: selected tokens, cost, and feature maps for hooks """
