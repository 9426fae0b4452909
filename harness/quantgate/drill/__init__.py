"""The drill: planted faults and benign changes, and which of them a policy's gates can tell."""
