"""Visual Perception Tokens: multimodal models that look again (arXiv 2502.17425)."""

__version__ = "0.1.0"
