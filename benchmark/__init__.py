"""What is left of a defense against model merging under a free-rider who fights back."""

__version__ = "0.1.0"
