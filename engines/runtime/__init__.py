"""Loads and runs engines, whichever compiler made them."""
