"""A checkpoint becomes ONNX: text encoders, DiT and VAE, each traced without its weights and then given them.

The way through: `checkpoint` opens what the user has, a family's file (`flux`) says which networks it consists of,
`trace` makes a graph of each under fake tensors, `weights` streams the values in, `onnx_export` writes the folder.
"""
