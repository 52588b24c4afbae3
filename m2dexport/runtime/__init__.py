"""What a device needs: artifacts and bundles, read, checked and run without torch."""

from m2dexport.runtime.encoder import Encoder
from m2dexport.runtime.loading import load

__all__ = ["Encoder", "load"]
