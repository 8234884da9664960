"""Scenarios that are known from elsewhere, as flows of this library."""
