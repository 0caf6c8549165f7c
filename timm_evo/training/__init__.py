""" Parts that only training needs """
