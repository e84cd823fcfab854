"""Text encoders that families share, and their tokenizers."""
