"""ONNX graphs: exported from torch, cut to one depth, finished by pooling and codes, fused."""
