""" What the commands of the folder above share """
