"""Number formats: which a network gets, what 8 bits need to be calibrated, and which linear layers bear them."""
