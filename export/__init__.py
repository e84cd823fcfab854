"""A checkpoint becomes ONNX: text encoders, DiT and VAE, each traced without its weights and then given them.

`checkpoint/` opens the files that people have, `families/` says which networks a checkpoint consists of, of which
`text_encoders/` has those that families share. `graph/` traces each network under fake tensors and writes it with its
weights, `quantisation/` chooses number formats, and `onnx_export.py` goes through all of it.
"""

import logging

# When diffusers' pipelines are imported, transformers remarks on two classes that work without torchvision, which no
# stage needs, and tells people to install it.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)
