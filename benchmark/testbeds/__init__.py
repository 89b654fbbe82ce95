"""Testbeds: a base model, its tasks, and the recipe that makes experts."""
