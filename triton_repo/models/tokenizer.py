"""The code that Triton's Python backend executes for the tokenizer: prompts become token ids for all text encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # exists inside Triton's Python backend only
from tokenizers import Tokenizer

from ditforge.triton_repo.models.engine import Arrays, answer_each, read_limits

COUNTS = "prompt_tokens"


class TritonPythonModel:
    """Triton's interface to a Python model (github.com/triton-inference-server/python_backend)."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        outputs = [tensor["name"] for tensor in config["output"]]
        self.name = config["name"]
        self.limits = read_limits(config)
        self.outputs = [name for name in outputs if name != COUNTS]
        files = [str(folder / f"{name.removesuffix('_ids')}.json") for name in self.outputs]
        self.tokenizers = [Tokenizer.from_file(file) for file in files]
        self.counters = [Tokenizer.from_file(file) for file in files]
        for counter in self.counters:  # these count the tokens of prompts before they are cut
            counter.no_truncation()
            counter.no_padding()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Prompts BYTES [B, 1] → ids int32 [B, T] for each encoder, their counts before the cut [B, encoders]."""
        return answer_each(self.name, requests, self.read, self.tokenize)

    def read(self, request: Any) -> Arrays:
        """Read the prompts of one request. Raises BadRequest for a prompt that is not UTF-8 or too long."""
        inputs = {"prompt": pb_utils.get_input_tensor_by_name(request, "prompt").as_numpy()}
        self.limits.check_arrays(inputs)
        return inputs

    def tokenize(self, parts: list[Arrays]) -> Arrays:
        """Tokenize the prompts of several requests, and return the outputs."""
        prompts = [prompt.decode() for part in parts for prompt in part["prompt"][:, 0]]
        tensors: Arrays = {
            name: np.array([e.ids for e in tokenizer.encode_batch(prompts)], np.int32)
            for name, tokenizer in zip(self.outputs, self.tokenizers, strict=True)
        }
        counts = [[len(e.ids) for e in counter.encode_batch(prompts)] for counter in self.counters]
        tensors[COUNTS] = np.array(counts, np.int32).T.copy()
        return tensors
