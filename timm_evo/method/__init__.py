""" The method: schedules, and steps on tensors. Nothing here knows a model. """
