"""An agent: a model says what to do next, its tools are steps, a person is asked before a dangerous one, and a history
that grows long starts anew."""
