"""The ops that attention is rewritten to, each with its meaning in plain PyTorch."""
