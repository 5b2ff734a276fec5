"""Every type of causal language model, split over real ranks by this project, against one process."""
