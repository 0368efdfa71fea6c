"""Checkpoints that others quantized: one module for each way in which their config.json says so."""
