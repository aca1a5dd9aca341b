"""Token layout: what each axis of a sequence is made of, followed from the model's inputs to every attention site."""
