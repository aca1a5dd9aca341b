"""What is known while a forward runs: its step, its calls, the labels of its tensors, the model around it."""
