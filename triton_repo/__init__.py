"""Engines become a Triton model repository, and a server that runs it.

`repository.py` writes the folder, `config.py` the models' configurations, `server.py` starts Triton; `models/` is what
Triton's Python backend executes.
"""
