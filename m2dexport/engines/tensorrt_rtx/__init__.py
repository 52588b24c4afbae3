"""TensorRT for RTX: portable engines, built without a GPU; all else is TensorRT's."""
