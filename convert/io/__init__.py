"""Files of tensors: safetensors, PyTorch pickles, folders, the hub, and output that appears whole."""
