"""ONNX Runtime.

Since 1.32, onnxruntime's Linux and macOS wheels report usage events to Microsoft: importing it
writes a device id under the home folder and a database beside it, and looks a name up. It reads
this variable once, while it is imported, which no module of m2dexport does before this one; the
processes that m2dexport starts inherit it.
"""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
