"""Colloquial captions for images, in a voice learned from plain text.

    from stylegan import Captioner
    captions = Captioner.from_pretrained().caption(["photograph.jpg"])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stylegan.brand import BrandRules
    from stylegan.captioner import Caption, Captioner, Decoding

__all__ = ["BrandRules", "Caption", "Captioner", "Decoding"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; who only reads catalogues does not wait
    if name in __all__:
        from stylegan import captioner

        return getattr(captioner, name)
    raise AttributeError(f"module 'stylegan' has no attribute {name!r}")
