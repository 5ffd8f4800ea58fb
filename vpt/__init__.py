"""Visual Perception Tokens: multimodal models that look again (arXiv 2502.17425)."""

from typing import Any

from vpt.utils.version import __version__

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """`vpt.load`, imported when it is asked for: `import vpt` stays light."""
    if name == "load":
        from vpt.generation.pipeline import load

        return load
    raise AttributeError(f"module 'vpt' has no attribute {name!r}")
