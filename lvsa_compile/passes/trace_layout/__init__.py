"""What each axis of each tensor is made of, followed from the model's inputs to every attention site."""
