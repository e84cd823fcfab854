"""The configurations of published models, a folder each in diffusers' layout, without weights and vocabularies."""
