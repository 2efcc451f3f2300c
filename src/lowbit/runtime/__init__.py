"""What runs a checkpoint on this machine: products of quantized weights, models that compute with them, and text."""
