"""The examples' flows, in process; tests/acceptance runs the examples themselves."""
