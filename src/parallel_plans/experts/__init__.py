"""Where tokens meet experts: pairs put into expert order, and rows sent to the ranks that own their experts."""
