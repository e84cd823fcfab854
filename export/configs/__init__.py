"""The configurations of published models: for each, a folder in diffusers' layout, without weights and vocabularies."""
