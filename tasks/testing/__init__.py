"""The test kit: an application's flows in the test's own process, on a clock that the test moves. No servers."""
