""" The method: schedules, and steps on tensors. Nothing here depends on a model. """
