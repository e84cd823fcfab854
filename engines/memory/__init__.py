"""What is in a GPU's memory, and when: whole networks, or segments of them."""
