"""Example applications; each is run by a test."""
