"""Quantization: the table of formats, calibration text, ModelOpt as quantizer, a numpy oracle."""
