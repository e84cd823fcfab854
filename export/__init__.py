"""A checkpoint becomes ONNX: text encoders, DiT and VAE are each traced without weights, which are attached afterwards.

`checkpoint/` opens the files that people have. `families/` says which networks a checkpoint consists of, and
`text_encoders/` contains the networks that several families share. `graph/` traces each network with fake tensors and
writes it together with its weights. `quantisation/` chooses the number formats. `onnx_export.py` runs all these steps.
"""

import logging

# When diffusers' pipelines are imported, transformers warns about two classes and tells people to install torchvision.
# No stage needs it, and both classes work without it, so the warning is dropped.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)
