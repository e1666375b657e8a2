"""Engines that run the graphs of a bundle behind one interface."""
