"""Number formats: which one a network gets, calibration for 8 bits, and which linear layers are quantised."""
