"""How `shrunken` makes a config small: layers by kind, sizes by role, and every choice tried."""
