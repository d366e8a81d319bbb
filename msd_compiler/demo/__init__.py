"""``msd demo``: what the compiler does for a language model, shown on one: perplexity, changed tokens, speed, size, a paragraph."""
