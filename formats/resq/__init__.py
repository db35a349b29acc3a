"""ResQ checkpoints: 4-bit weights, activations and KV cache with an 8-bit part, and how they run.

Public, by module (importing this package imports none of them):

    parts       Parts                     consecutive channels, each part with its own bits
    config      ResqConfig, QUANT_METHOD  quantization_config of a checkpoint
    quantizer   quantize_vectors, dequantize_vectors, quantize_dequantize
    weight      ResqWeight, resq_layout, resq_tensors, resq_weight_from
    hadamard    kronecker_apply           the transform of down_proj's input (U_D)
    linear      ResqLinear, QuantizedInputLinear
    cache       ResqCache                 packed keys and values
    attention   KeyRotation               U_C; stored as `<layer>.self_attn.key_rotation.weight`
    install     install, full_precision, ARCHITECTURES
    loading     ResqHfQuantizer           registration with transformers

Source: ResQ, Saxena et al. 2024 (arXiv:2412.14363).
"""
