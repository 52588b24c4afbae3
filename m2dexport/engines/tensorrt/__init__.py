"""TensorRT: an ONNX graph, and how an engine is made of it on the GPU that runs it.

``recipe`` is the file that says how, ``library`` makes and reads engines, ``cuda`` is the part of
CUDA's runtime that is needed, ``session`` runs an engine, ``store`` keeps it, and ``oracle`` runs
the same graph by onnxruntime where there is no GPU. TensorRT-RTX shares all of it.
"""
