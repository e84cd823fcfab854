"""LoRAs and other adapters: files of small tensors that change the weights of a checkpoint when these are read."""
