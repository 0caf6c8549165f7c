""" The steps of the selections as kernels for a GPU, in Triton: fewer launches, and attention that knows sizes """
