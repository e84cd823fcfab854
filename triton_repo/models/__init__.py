"""The code that Triton's Python backend executes: one module for networks, one for the tokenizer."""
