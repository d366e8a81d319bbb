"""``msd.Attention``: attention over a low-bit KV cache, without dequantizing the cache."""
