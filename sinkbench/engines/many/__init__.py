"""Triton programs for the parts of a forward of many tokens that torch takes several launches for."""
