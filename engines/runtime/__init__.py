"""Engines are loaded and run, whatever compiled them."""
