"""Own bytes in, own bytes out: reading, converting and writing safetensors checkpoints."""
