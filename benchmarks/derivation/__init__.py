"""Plans that are derived for every type, judged."""
