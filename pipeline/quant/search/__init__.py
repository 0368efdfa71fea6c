"""Quantizing the linears of one decoder layer: scales, clipping and rounding from Gram matrices."""
