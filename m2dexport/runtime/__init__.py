"""What a device needs: artifacts and bundles, read, checked and run without torch."""

from m2dexport.runtime.encoder import Encoder, load

__all__ = ["Encoder", "load"]
