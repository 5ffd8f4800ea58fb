"""Visual Perception Tokens: multimodal models that look again (arXiv 2502.17425)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpt.pretrained import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """`vpt.load`, imported when it is asked for: `import vpt` stays light."""
    if name == "load":
        from vpt.pretrained import load

        return load
    raise AttributeError(f"module 'vpt' has no attribute {name!r}")
