"""Running the notebooks and drawing their figures, in one style."""
