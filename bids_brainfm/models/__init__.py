"""Architectures in plain PyTorch, model cards, weights, and the connectome baseline."""
