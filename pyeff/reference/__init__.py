"""The operations in plain torch: the oracle, the documentation, and what runs where nothing faster can."""
