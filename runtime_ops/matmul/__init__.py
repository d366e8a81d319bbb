"""``msd.MatMul``: a float activation times a low-bit weight, without dequantizing the weight."""
