"""Engines become a Triton model repository, and a server that runs it.

`repository` writes the folder, `config` the models' configurations, `server` starts Triton; `engine_model` and
`tokenizer_model` are what Triton's Python backend executes.
"""
