""" What looks at an evolved model: which tokens it keeps, what it costs, what hooks see """
