"""Is a language model still right: perplexity, KL divergence and changed tokens on a text, against its exact meaning.

`measure.evaluate` is what the command calls. Nothing is imported here: `command` is, whenever `msd` starts.
"""
