""" Triton kernels for GPUs: the steps of the selections in fewer launches, and attention with token sizes """
