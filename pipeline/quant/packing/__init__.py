"""From a quantized decoder layer in memory to the tensors of ModelOpt's unified layout, and back."""
