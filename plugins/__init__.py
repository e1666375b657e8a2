"""Custom operators, one folder each: specification, reference, kernel and bindings."""
