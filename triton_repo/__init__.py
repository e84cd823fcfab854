"""Write a Triton model repository for a build's engines, and run a server on it.

`repository.py` writes the repository's folder, `config.py` makes the models' configurations, and `server.py` starts
Triton. `models/` has the code that Triton's Python backend executes.
"""
