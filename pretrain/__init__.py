"""Exact, elastic pretraining of Vision Transformers with PyTorch, DeepSpeed and WebDataset."""

__version__ = "0.1.0"
