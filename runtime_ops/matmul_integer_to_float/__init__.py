"""``msd.MatMulIntegerToFloat``: an activation that the model itself gives as 8- or 16-bit codes, times a low-bit weight."""
