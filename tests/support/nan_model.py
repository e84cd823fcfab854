"""A DiT for Triton's Python backend that overflows in the second half of a picture."""

import numpy as np
import triton_python_backend_utils as pb_utils  # exists inside Triton's Python backend only


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            latents = pb_utils.get_input_tensor_by_name(request, "latents").as_numpy()
            sigma = pb_utils.get_input_tensor_by_name(request, "timestep").as_numpy().reshape(-1, 1, 1, 1)
            velocity = np.where(sigma > 0.5, latents, np.float32("nan"))
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("velocity", velocity)]))
        return answers
