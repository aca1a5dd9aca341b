"""Following the forward of a model while it runs, so that the graphs of its blocks know what they get."""
