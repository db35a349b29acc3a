"""ResQ and its baselines: 4-bit weights, activations and cache with a high-precision part."""
