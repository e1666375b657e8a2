"""Inputs and accuracy classes that every check of an operator shares."""
