"""A chord that was there before, shown as a flow: which part failed at first, which was retried, when it was over."""
